"""A front end without clients: keeps an engine busy over engine.proto and looks at the output."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import grpc
import numpy as np

from blockyard.common.columns import pack_u32
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc

_READY_TIMEOUT_S: Final = 20.0
_VOCAB_SIZE: Final = 1000
"""The fake executor's."""

Stream = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


class EngineDriver:
    """One link to an engine that is ready."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._request_ids = itertools.count(1)
        self._outbox: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
        self.num_batches = 0
        self.num_finished = 0

    def submit(self, prompts: list[int], max_tokens: list[int]) -> None:
        """Queue requests of these lengths, parallel [n]; their prompts have nothing in common."""
        request_ids = itertools.islice(self._request_ids, len(prompts))
        submits = [
            pb.Submit(
                request_id=request_id,
                prompt_token_ids=pack_u32(np.full(num_tokens, request_id % _VOCAB_SIZE)),
                max_tokens=limit,
            )
            for request_id, num_tokens, limit in zip(request_ids, prompts, max_tokens, strict=True)
        ]
        self._outbox.put_nowait(pb.ConnectRequest(submit=pb.SubmitBatch(submits=submits)))

    async def run(self, on_finished: Callable[[int], None] | None = None) -> None:
        """Count output until cancelled; `on_finished` gets how many requests a batch ended.

        Raises RuntimeError if a request is refused or fails, or the engine goes.
        """
        writer = asyncio.create_task(self._write())
        try:
            while True:
                frame = await _read(self._stream)
                if frame.HasField("output"):
                    self._take(frame.output, on_finished)
        finally:
            writer.cancel()

    def _take(self, output: pb.OutputBatch, on_finished: Callable[[int], None] | None) -> None:
        if output.rejections:
            raise RuntimeError(f"refused: {output.rejections[0].message}")
        self.num_batches += 1
        for finish in output.finishes:
            if finish.reason != pb.FINISH_REASON_LENGTH:
                raise RuntimeError(f"ended early: {finish}")
        self.num_finished += len(output.finishes)
        if output.finishes and on_finished is not None:
            on_finished(len(output.finishes))

    async def _write(self) -> None:
        while True:
            await self._stream.write(await self._outbox.get())


@asynccontextmanager
async def engine_driver(address: str) -> AsyncIterator[EngineDriver]:
    """Connect and wait until the engine is ready. Leaving aborts all requests."""
    async with grpc.aio.insecure_channel(address, options=LINK_OPTIONS) as channel:
        stream: Stream = engine_pb2_grpc.EngineServiceStub(channel).Connect()
        hello = pb.Hello(protocol_version=ENGINE_PROTOCOL_VERSION, frontend_id="benchmark")
        await stream.write(pb.ConnectRequest(hello=hello))
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while not (await _read(stream)).state.ready:
                pass
        yield EngineDriver(stream)
        stream.cancel()


async def _read(stream: Stream) -> pb.ConnectResponse:
    frame = await stream.read()
    if not isinstance(frame, pb.ConnectResponse):
        raise RuntimeError("the engine closed the stream")
    return frame

"""An EngineService in the test's own loop that does what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import grpc.aio

from blockyard.common.columns import unpack_u32
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class FakeEngine(pb_grpc.EngineServiceServicer):
    """Records submits and stops; sends what the test asks for."""

    def __init__(self, address: str, state: pb.EngineState) -> None:
        self.address = address
        self.state = state
        self.refusal: str | None = None
        self.hellos: list[pb.Hello] = []
        self.submits: asyncio.Queue[pb.Submit] = asyncio.Queue()
        self.stops: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._outgoing: list[asyncio.Queue[pb.ConnectResponse | None]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=LINK_OPTIONS)
        pb_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def kill(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        self.hellos.append((await anext(requests)).hello)
        if self.refusal is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        outgoing: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()
        self._outgoing.append(outgoing)
        reader = asyncio.create_task(self._read(requests))
        try:
            yield pb.ConnectResponse(state=self.state)
            while (frame := await outgoing.get()) is not None:
                yield frame
        finally:
            reader.cancel()
            self._outgoing.remove(outgoing)

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        async for frame in requests:
            for submit in frame.submit.submits:
                self.submits.put_nowait(submit)
            for stop in zip(frame.stop.request_ids, frame.stop.num_output_tokens, strict=True):
                self.stops.put_nowait(stop)

    def WatchExecutor(
        self,
        request: pb.WatchExecutorRequest,
        context: grpc.aio.ServicerContext[pb.WatchExecutorRequest, pb.WatchExecutorResponse],
    ) -> AsyncIterator[pb.WatchExecutorResponse]:
        raise NotImplementedError("no front end calls this")

    def Snapshot(
        self,
        request: pb.SnapshotRequest,
        context: grpc.aio.ServicerContext[pb.SnapshotRequest, pb.SnapshotResponse],
    ) -> pb.SnapshotResponse:
        raise NotImplementedError("no front end calls this")

    async def send(self, batch: pb.OutputBatch) -> None:
        """Send to every front end, and let the loop turn once."""
        for outgoing in self._outgoing:
            outgoing.put_nowait(pb.ConnectResponse(output=batch))
        await asyncio.sleep(0)

    def end_streams(self) -> None:
        """End every front end's stream with OK."""
        for outgoing in self._outgoing:
            outgoing.put_nowait(None)

    def send_state(self, state: pb.EngineState) -> None:
        self.state = state
        for outgoing in self._outgoing:
            outgoing.put_nowait(pb.ConnectResponse(state=state))

    async def send_tokens(
        self, key: int, token_ids: Sequence[int], finish: pb.Finish | None = None
    ) -> None:
        """One batch with tokens of one request, and its end."""
        batch = pb.OutputBatch(
            request_ids=[key], token_counts=[len(token_ids)], token_ids=token_ids
        )
        if finish is not None:
            finish.request_id = key
            batch.finishes.append(finish)
        await self.send(batch)

    async def next_submit(self) -> tuple[pb.Submit, list[int]]:
        """The next request and its prompt."""
        submit = await asyncio.wait_for(self.submits.get(), 10)
        return submit, unpack_u32(submit.prompt_token_ids).tolist()

    async def next_stop(self) -> tuple[int, int]:
        return await asyncio.wait_for(self.stops.get(), 10)


def unix_address(directory: Path) -> str:
    return f"unix:{directory}/engine.sock"


def finished(
    reason: str, num_cached_tokens: int = 0, stop_token_id: int | None = None
) -> pb.Finish:
    """A Finish; its request id is filled in when it is sent."""
    finish = pb.Finish(
        reason=pb.FinishReason.Value(f"FINISH_REASON_{reason}"), num_cached_tokens=num_cached_tokens
    )
    if stop_token_id is not None:
        finish.stop_token_id = stop_token_id
    return finish

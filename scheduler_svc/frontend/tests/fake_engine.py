"""An EngineService in the test's own loop that does what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from blockyard.common.columns import unpack_u32
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc as pb_grpc
from scheduler_svc.frontend.fanout import Stop

Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class FakeEngine(pb_grpc.EngineServiceServicer):
    """Records submits and stops; sends what the test asks for."""

    def __init__(self, address: str, state: pb.EngineState) -> None:
        self.address = address
        self.state = state
        self.refusal: str | None = None
        self.hellos: list[pb.Hello] = []
        self.submits: asyncio.Queue[pb.Submit] = asyncio.Queue()
        self.stops: asyncio.Queue[Stop] = asyncio.Queue()
        self.reports: asyncio.Queue[pb.FrontendMetrics] = asyncio.Queue()
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
            if frame.HasField("metrics"):
                self.reports.put_nowait(frame.metrics)
            stop = frame.stop
            for fields in zip(stop.request_ids, stop.num_output_tokens, stop.branches, strict=True):
                self.stops.put_nowait(Stop(*fields))

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

    def FlushCache(
        self,
        request: pb.FlushCacheRequest,
        context: grpc.aio.ServicerContext[pb.FlushCacheRequest, pb.FlushCacheResponse],
    ) -> pb.FlushCacheResponse:
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
        """One batch with tokens of one request's only branch, and its end."""
        finishes = [] if finish is None else [finish]
        await self.send_branches(key, {0: token_ids}, *finishes)

    async def send_branches(
        self, key: int, token_ids: Mapping[int, Sequence[int]], *finishes: pb.Finish
    ) -> None:
        """One batch with tokens of several branches of one request, and the ends of some."""
        await self.send(branch_batch(key, token_ids, *finishes))

    async def next_submit(self) -> tuple[pb.Submit, list[int]]:
        """The next request and its prompt."""
        submit = await asyncio.wait_for(self.submits.get(), 10)
        return submit, unpack_u32(submit.prompt_token_ids).tolist()

    async def next_stop(self) -> Stop:
        return await asyncio.wait_for(self.stops.get(), 10)


def unix_address(directory: Path) -> str:
    return f"unix:{directory}/engine.sock"


def branch_batch(
    key: int, token_ids: Mapping[int, Sequence[int]], *finishes: pb.Finish
) -> pb.OutputBatch:
    """Tokens by branch of one request, and the ends of some; their request id is filled in."""
    batch = pb.OutputBatch(
        request_ids=[key] * len(token_ids),
        branches=list(token_ids),
        token_counts=[len(ids) for ids in token_ids.values()],
        token_ids=[token_id for ids in token_ids.values() for token_id in ids],
        finishes=finishes,
    )
    for finish in batch.finishes:
        finish.request_id = key
    return batch


def with_logprobs(batch: pb.OutputBatch, num_candidates: int) -> pb.OutputBatch:
    """The batch with the log-probability -i of its token number i, and candidates' after it."""
    num_tokens = len(batch.token_ids)
    batch.num_logprobs.extend([1 + num_candidates] * num_tokens)
    batch.token_logprobs.extend(-float(i) for i in range(num_tokens))
    for i in range(num_tokens):
        batch.candidate_token_ids.extend(range(num_candidates))
        batch.candidate_logprobs.extend(-i - k / 8 for k in range(num_candidates))
    return batch


def finished(
    reason: str,
    num_cached_tokens: int = 0,
    stop_token_id: int | None = None,
    *,
    branch: int = 0,
    is_last: bool = True,
    **fields: Any,
) -> pb.Finish:
    """The Finish of a branch, by default the one that ends its request.

    Its request id is filled in when it is sent.
    """
    finish = pb.Finish(
        reason=pb.FinishReason.Value(f"FINISH_REASON_{reason}"),
        num_cached_tokens=num_cached_tokens,
        stop_token_id=stop_token_id,
        branch=branch,
        **fields,
    )
    if is_last:
        finish.blocks.SetInParent()
    return finish

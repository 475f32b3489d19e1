"""A front end's stream to the engine, as a test drives it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from blockyard.common.columns import pack_u32
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc as pb_grpc

_Call = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


@dataclass(slots=True, eq=False)
class Output:
    """What came for one request. `ended` is set by a finish, a rejection or the stream's end."""

    request_id: int
    token_ids: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None
    rejection: pb.Rejection | None = None
    num_batches: int = 0  # frames that carried tokens of it
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, num_tokens: int) -> None:
        """Wait until it has so many tokens, or ended."""
        while len(self.token_ids) < num_tokens and not self.ended.is_set():
            self.grown.clear()
            await self.grown.wait()

    async def finished(self) -> pb.Finish:
        """Wait for the end, which must be a finish."""
        await self.ended.wait()
        assert self.finish is not None, self.rejection or "the stream ended"
        return self.finish


class EngineClient:
    """One Connect stream and the engine's other calls; use as a context manager."""

    def __init__(self, address: str, model_digest: str = "") -> None:
        """Nothing is connected before the context is entered."""
        self.outputs: dict[int, Output] = {}
        self.states: list[pb.EngineState] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._hello = pb.Hello(
            protocol_version=ENGINE_PROTOCOL_VERSION, frontend_id="test", model_digest=model_digest
        )
        self._channel = grpc.aio.insecure_channel(
            address, [*LINK_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub: pb_grpc.EngineServiceAsyncStub = pb_grpc.EngineServiceStub(self._channel)
        self._call: _Call = self.stub.Connect(wait_for_ready=True)
        self._outbox: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._outbox.put_nowait(pb.ConnectRequest(hello=self._hello))
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def ready(self) -> pb.EngineState:
        """Wait until the engine has an executor; returns its state."""
        while not self.states or not self.states[-1].ready:
            assert self.error is None, self.error
            self._changed.clear()
            await self._changed.wait()
        return self.states[-1]

    def submit(self, prompt: Sequence[int], max_tokens: int, **fields: Any) -> Output:
        """Send one request; `fields` are Submit's. Greedy unless they say otherwise."""
        output, submit = self._new_request(prompt, max_tokens, **fields)
        self._send(pb.ConnectRequest(submit=pb.SubmitBatch(submits=[submit])))
        return output

    def submit_many(self, requests: Sequence[tuple[Sequence[int], int]]) -> list[Output]:
        """Send greedy requests (prompt, max_tokens) in one batch."""
        created = [self._new_request(prompt, max_tokens) for prompt, max_tokens in requests]
        batch = pb.SubmitBatch(submits=[submit for _, submit in created])
        self._send(pb.ConnectRequest(submit=batch))
        return [output for output, _ in created]

    def stop(self, output: Output, num_output_tokens: int = 0) -> None:
        """End a request early; 0 aborts it."""
        stops = pb.StopBatch(request_ids=[output.request_id], num_output_tokens=[num_output_tokens])
        self._send(pb.ConnectRequest(stop=stops))

    async def snapshot(self) -> pb.SnapshotResponse:
        """Queues and pool now; the classes of the pool are checked to sum up."""
        shot = await self.stub.Snapshot(pb.SnapshotRequest(), wait_for_ready=True)
        assert shot.num_free_blocks + shot.num_used_blocks == shot.num_device_blocks
        return shot

    async def snapshot_when(
        self, condition: Callable[[pb.SnapshotResponse], bool]
    ) -> pb.SnapshotResponse:
        """The first snapshot for which `condition` holds."""
        while not condition(shot := await self.snapshot()):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.005)
        return shot

    async def idle(self) -> pb.SnapshotResponse:
        """Wait until nothing runs or waits; returns that snapshot."""
        shot = await self.snapshot_when(lambda s: not (s.num_running or s.num_waiting))
        assert shot.num_used_blocks == 0, shot
        return shot

    async def watch_until(
        self, state: pb.WatchExecutorResponse.State.ValueType, reason: str = ""
    ) -> pb.WatchExecutorResponse:
        """Wait until the executor link is in that state for a reason that contains `reason`."""
        request = pb.WatchExecutorRequest()
        async for update in self.stub.WatchExecutor(request, wait_for_ready=True):
            if update.state == state and reason in update.message:
                return update
        raise AssertionError("the watch ended")

    def _new_request(
        self, prompt: Sequence[int], max_tokens: int, **fields: Any
    ) -> tuple[Output, pb.Submit]:
        request_id = len(self.outputs) + 1
        self.outputs[request_id] = output = Output(request_id)
        fields = {"prompt_token_ids": pack_u32(prompt), **fields}
        submit = pb.Submit(request_id=request_id, max_tokens=max_tokens, **fields)
        return output, submit

    def _send(self, frame: pb.ConnectRequest) -> None:
        self._outbox.put_nowait(frame)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outbox.get())

    async def _read(self) -> None:
        try:
            async for frame in self._call:
                if frame.HasField("state"):
                    self.states.append(frame.state)
                    self._changed.set()
                else:
                    self._apply(frame.output)
        except grpc.aio.AioRpcError as error:
            self.error = error
        self._changed.set()
        for output in self.outputs.values():
            output.ended.set()
            output.grown.set()

    def _apply(self, batch: pb.OutputBatch) -> None:
        counts = batch.token_counts or [1] * len(batch.request_ids)
        begin = 0
        for request_id, count in zip(batch.request_ids, counts, strict=True):
            output = self.outputs[request_id]
            assert not output.ended.is_set(), f"request {request_id}: tokens after its end"
            output.token_ids.extend(batch.token_ids[begin : begin + count])
            output.num_batches += 1
            output.grown.set()
            begin += count
        for finish in batch.finishes:
            self._end(finish.request_id).finish = finish
        for rejection in batch.rejections:
            self._end(rejection.request_id).rejection = rejection

    def _end(self, request_id: int) -> Output:
        output = self.outputs[request_id]
        assert not output.ended.is_set(), f"request {request_id}: ended twice"
        output.ended.set()
        output.grown.set()
        return output

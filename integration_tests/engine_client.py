"""A front end's stream to the engine, as a test drives it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
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


@dataclass(slots=True)
class TokenLogprobs:
    """One token's log-probabilities: its own, and the likeliest tokens', best first."""

    logprob: float
    candidate_token_ids: list[int]
    candidate_logprobs: list[float]


@dataclass(slots=True)
class Choice:
    """What came for one branch of a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of those that were asked for
    finish: pb.Finish | None = None


@dataclass(slots=True, eq=False)
class Output:
    """What came for one request.

    `ended` is set by its last finish, a rejection or the stream's end.
    """

    request_id: int
    choices: defaultdict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    rejection: pb.Rejection | None = None
    num_batches: int = 0  # frames that carried tokens of it
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> list[int]:
        """Of branch 0."""
        return self.choices[0].token_ids

    @property
    def finish(self) -> pb.Finish | None:
        """The finish that ended the request."""
        finishes = (choice.finish for choice in self.choices.values())
        return next((each for each in finishes if each is not None and _is_last(each)), None)

    async def until(self, num_tokens: int, branch: int = 0) -> None:
        """Wait until a branch has so many tokens, or the request ended."""
        while len(self.choices[branch].token_ids) < num_tokens and not self.ended.is_set():
            self.grown.clear()
            await self.grown.wait()

    async def finished(self) -> pb.Finish:
        """Wait for the end, which must be a finish; returns the one that says so."""
        await self.ended.wait()
        assert self.finish is not None, self.rejection or "the stream ended"
        return self.finish

    async def rejected(self) -> pb.Rejection:
        """Wait for the end, which must be a rejection."""
        await self.ended.wait()
        assert self.rejection is not None, self.finish or "the stream ended"
        return self.rejection


def _is_last(finish: pb.Finish) -> bool:
    return finish.HasField("blocks")


def num_held_slots(shot: pb.SnapshotResponse) -> int:
    """Slots of the device blocks that requests hold."""
    return shot.device.num_stored + shot.device.num_in_flight + shot.device.num_unused


def check_classes(shot: pb.SnapshotResponse) -> None:
    """Assert that the classes of each pool sum to it."""
    device, host = shot.device, shot.host
    num_others = device.num_cached + device.num_free + device.num_padding
    assert num_held_slots(shot) + num_others == device.num_slots, device
    assert host.num_swapped + host.num_cached + host.num_free == host.num_slots, host


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

    def stop(self, output: Output, num_output_tokens: int = 0, branch: int = 0) -> None:
        """End a branch early, with so many output tokens; 0 aborts the request."""
        stops = pb.StopBatch(
            request_ids=[output.request_id],
            num_output_tokens=[num_output_tokens],
            branches=[branch] if branch else [],
        )
        self._send(pb.ConnectRequest(stop=stops))

    async def snapshot(self) -> pb.SnapshotResponse:
        """Queues and pools now; the classes of each pool are checked to sum up."""
        shot = await self.stub.Snapshot(pb.SnapshotRequest(), wait_for_ready=True)
        check_classes(shot)
        return shot

    async def flush_cache(self) -> pb.FlushCacheResponse:
        """Let the engine forget what is cached; returns how much that was."""
        return await self.stub.FlushCache(pb.FlushCacheRequest())

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
        assert num_held_slots(shot) == shot.host.num_swapped == 0, shot
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
        branches = batch.branches or [0] * len(batch.request_ids)
        assert len(set(zip(batch.request_ids, branches, strict=True))) == len(batch.request_ids)
        logprobs = _logprobs_of(batch)
        begin = 0
        for request_id, branch, count in zip(batch.request_ids, branches, counts, strict=True):
            output, end = self.outputs[request_id], begin + count
            choice = output.choices[branch]
            assert not output.ended.is_set(), f"request {request_id}: tokens after its end"
            assert choice.finish is None, f"request {request_id}: tokens after a branch's end"
            choice.token_ids.extend(batch.token_ids[begin:end])
            choice.logprobs.extend(each for each in logprobs[begin:end] if each is not None)
            output.num_batches += 1
            output.grown.set()
            begin = end
        assert begin == len(batch.token_ids)
        for finish in batch.finishes:
            self._finish(finish)
        for rejection in batch.rejections:
            self._end(rejection.request_id).rejection = rejection

    def _finish(self, finish: pb.Finish) -> None:
        choice = self.outputs[finish.request_id].choices[finish.branch]
        assert choice.finish is None, f"request {finish.request_id}: a branch ended twice"
        choice.finish = finish
        if _is_last(finish):
            self._end(finish.request_id)

    def _end(self, request_id: int) -> Output:
        output = self.outputs[request_id]
        assert not output.ended.is_set(), f"request {request_id}: ended twice"
        output.ended.set()
        output.grown.set()
        return output


def _logprobs_of(batch: pb.OutputBatch) -> list[TokenLogprobs | None]:
    """Of each token of the batch; None: not asked for."""
    if not batch.num_logprobs:
        return [None] * len(batch.token_ids)
    own = iter(batch.token_logprobs)
    candidates = iter(zip(batch.candidate_token_ids, batch.candidate_logprobs, strict=True))
    found: list[TokenLogprobs | None] = []
    for count in batch.num_logprobs:
        if not count:
            found.append(None)
            continue
        likeliest = [next(candidates) for _ in range(count - 1)]
        found.append(TokenLogprobs(next(own), [i for i, _ in likeliest], [p for _, p in likeliest]))
    assert len(found) == len(batch.token_ids)
    return found

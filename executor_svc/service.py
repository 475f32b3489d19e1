"""The gRPC face of the executor: one live step stream, heartbeats, Describe.

Runs on the event loop and never touches the device. Results are kept by the ledger whether or not
a stream is up, so a stream may break at any moment and the next one goes on where it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import grpc

from blockyard.common import logs
from blockyard.common.process import process_usage
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION, HEARTBEAT_INTERVAL_S
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from executor_svc.plan import PlanError
from executor_svc.runner import Runner
from executor_svc.step_ledger import StepLedger
from executor_svc.step_worker import StepWorker, rejection

MISSED_HEARTBEATS: Final = 2
"""After so many silent intervals another scheduler may take a live stream over."""

_SHUTTING_DOWN: Final = (grpc.StatusCode.UNAVAILABLE, "the executor is shutting down")

log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]


@dataclass(slots=True)
class _Stream:
    """A step stream from its Open on; `frames` is drained by its handler, None ends it."""

    scheduler_id: int
    last_heard_s: float
    frames: asyncio.Queue[pb.RunResponse | None] = field(default_factory=asyncio.Queue)
    error: tuple[grpc.StatusCode, str] | None = None

    def send(self, frame: pb.RunResponse) -> None:
        self.frames.put_nowait(frame)

    def end(self, error: tuple[grpc.StatusCode, str] | None = None) -> None:
        """End the stream after the frames sent so far; the first reason given counts."""
        self.error = self.error or error
        self.frames.put_nowait(None)


class ExecutorServicer(pb_grpc.ExecutorServiceServicer):
    """Serves one runner to one scheduler at a time. Also the owner of its StepWorker."""

    def __init__(self, runner: Runner, heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S) -> None:
        """Takes the runner over: from `start` on it is called by the worker's threads only."""
        self._info = runner.info
        self._heartbeat_interval_s = heartbeat_interval_s
        self._worker = StepWorker(runner, self)
        self._ledger = StepLedger()
        self._stream: _Stream | None = None
        self._scheduler_id = 0
        self._has_left = asyncio.Event()  # there is no stream
        self._has_left.set()
        self._is_stopping = False
        self._fatal: asyncio.Future[str] | None = None

    def start(self) -> asyncio.Future[str]:
        """Start the worker on the running loop; the future resolves if the device is lost."""
        loop = asyncio.get_running_loop()
        self._worker.start(loop)
        self._fatal = loop.create_future()
        return self._fatal

    async def until_left(self, limit_s: float) -> None:
        """Wait until no scheduler's stream is up, but not longer than the limit."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_left.wait(), limit_s)

    async def stop(self) -> None:
        """Refuse new streams, end the live one, then the worker after the steps under way."""
        self._is_stopping = True
        if self._stream is not None:
            self._stream.end(_SHUTTING_DOWN)
        await asyncio.to_thread(self._worker.stop)

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.DescribeResponse:
        """See the proto."""
        info = self._info
        return pb.DescribeResponse(
            protocol_version=EXECUTOR_PROTOCOL_VERSION,
            model_digest=info.model_digest,
            model_name=info.model_name,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            num_device_blocks=info.num_device_blocks,
            num_host_blocks=info.num_host_blocks,
            max_rows=info.max_rows,
            max_num_batched_tokens=info.max_num_batched_tokens,
            block_bytes=info.block_bytes,
            cost_model=self._worker.cost_model(),
            device=info.device,
        )

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: _Context
    ) -> AsyncIterator[pb.RunResponse]:
        """See the proto."""
        stream = await self._open(request_iterator, context)
        tasks = [
            asyncio.create_task(self._read(stream, request_iterator)),
            asyncio.create_task(self._beat(stream)),
        ]
        try:
            while (frame := await stream.frames.get()) is not None:
                yield frame
        finally:
            for task in tasks:
                task.cancel()
            if self._stream is stream:
                self._stream = None
                self._has_left.set()
        if stream.error is not None:
            await context.abort(*stream.error)

    def on_result(self, result: pb.StepResult) -> None:
        """StepEvents: keep the result, and send it if a stream is up."""
        if self._ledger.complete(result):
            self._send(pb.RunResponse(result=result))

    def on_rejected(self, rejected: pb.PlanRejected) -> None:
        """StepEvents: the plan no longer counts as applied."""
        if rejected.epoch == self._ledger.epoch:
            log.error("plan rejected: %s", rejected.reason, extra=_fields(rejected.step_id))
            self._ledger.withdraw(rejected.step_id)
            self._send(pb.RunResponse(rejected=rejected))

    def on_fault(self, fault: pb.Fault, *, is_fatal: bool) -> None:
        """StepEvents: no plan is accepted until the next Open."""
        if fault.epoch == self._ledger.epoch:
            self._ledger.end_epoch()
            self._send(pb.RunResponse(fault=fault))
            if self._stream is not None:
                self._stream.end()
        if is_fatal and self._fatal is not None and not self._fatal.done():
            self._fatal.set_result(fault.message)

    async def _open(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: _Context
    ) -> _Stream:
        """Take the stream over from its predecessor, or abort the call."""
        if self._is_stopping:
            await context.abort(*_SHUTTING_DOWN)
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("frame") != "open":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be Open")
        opening = first.open
        await self._check_compatible(opening, context)
        now_s = asyncio.get_running_loop().time()
        if self._stream is not None:
            silence_s = now_s - self._stream.last_heard_s
            is_silent = silence_s > MISSED_HEARTBEATS * self._heartbeat_interval_s
            if self._stream.scheduler_id != opening.scheduler_id and not is_silent:
                message = "another scheduler's stream is live"
                await context.abort(grpc.StatusCode.ABORTED, message)
            self._stream.end((grpc.StatusCode.ABORTED, "replaced by a newer stream"))
        self._stream = _Stream(opening.scheduler_id, now_s)
        self._has_left.clear()
        self._resume_or_reset(opening, self._stream)
        return self._stream

    async def _check_compatible(self, opening: pb.Open, context: _Context) -> None:
        if opening.protocol_version != EXECUTOR_PROTOCOL_VERSION:
            message = (
                f"protocol version {opening.protocol_version}; "
                f"this executor speaks {EXECUTOR_PROTOCOL_VERSION}"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        if opening.model_digest not in ("", self._info.model_digest):
            message = f"model digest {opening.model_digest}; this one is {self._info.model_digest}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)

    def _resume_or_reset(self, opening: pb.Open, stream: _Stream) -> None:
        ledger = self._ledger
        can_resume = (
            opening.scheduler_id == self._scheduler_id
            and not opening.reset
            and ledger.can_resume(opening.epoch, opening.last_committed_step_id)
        )
        if not can_resume:
            self._scheduler_id = opening.scheduler_id
            self._worker.begin_epoch(ledger.begin_epoch())
        opened = pb.Opened(epoch=ledger.epoch, applied_step_id=ledger.applied_step_id)
        stream.send(pb.RunResponse(opened=opened))
        if can_resume:
            for result in ledger.kept_after(opening.last_committed_step_id):
                stream.send(pb.RunResponse(result=result))
        logs.event(
            log,
            "stream opened",
            epoch=ledger.epoch,
            applied_step_id=ledger.applied_step_id,
            resumed=can_resume,
        )

    async def _read(self, stream: _Stream, request_iterator: AsyncIterator[pb.RunRequest]) -> None:
        """Take the scheduler's frames until it ends the stream or breaks the contract."""
        loop = asyncio.get_running_loop()
        error = None
        async for request in request_iterator:
            if stream is not self._stream:
                break
            stream.last_heard_s = loop.time()
            kind = request.WhichOneof("frame")
            if kind == "plan":
                self._take(request.plan, stream)
            elif kind != "heartbeat":
                error = (grpc.StatusCode.INVALID_ARGUMENT, f"frame {kind} inside a stream")
                break
        stream.end(error)

    def _take(self, plan: pb.StepPlan, stream: _Stream) -> None:
        ledger = self._ledger
        try:
            is_next = ledger.accept(plan.epoch, plan.step_id)
        except PlanError as error:
            expected = ledger.applied_step_id + 1
            rejected = rejection(plan.epoch, plan.step_id, expected, error)
            stream.send(pb.RunResponse(rejected=rejected))
            return
        if is_next:
            self._worker.submit(plan)
        elif (result := ledger.kept(plan.step_id)) is not None:
            stream.send(pb.RunResponse(result=result))

    async def _beat(self, stream: _Stream) -> None:
        while True:
            # Frames that wait to be taken say the same, and a reader that is stuck gets no more.
            if stream.frames.empty():
                usage = process_usage()
                heartbeat = pb.Heartbeat(
                    applied_step_id=self._ledger.applied_step_id,
                    completed_step_id=self._ledger.completed_step_id,
                    cost_model=self._worker.cost_model(),
                    cpu_seconds=usage.cpu_s,
                    resident_bytes=usage.resident_bytes,
                )
                stream.send(pb.RunResponse(heartbeat=heartbeat))
            await asyncio.sleep(self._heartbeat_interval_s)

    def _send(self, frame: pb.RunResponse) -> None:
        if self._stream is not None:
            self._stream.send(frame)


def _fields(step_id: int) -> dict[str, dict[str, int]]:
    return {"fields": {"step_id": step_id}}

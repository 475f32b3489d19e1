"""The step stream to one executor: open, window, resend, heartbeats. No policy.

The scheduler's side of the contract in executor.proto. The client never gives up: while no
executor answers it keeps trying, says why, and goes on when one appears.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import grpc

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION, HEARTBEAT_INTERVAL_S
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc

logger = logging.getLogger(__name__)

RETRY_S = 0.2
DESCRIBE_TIMEOUT_S = 5.0

Stream = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]


class LinkState(enum.Enum):
    """The executor as this client sees it; the names are those of WatchExecutorResponse.State."""

    CONNECTING = enum.auto()
    READY = enum.auto()
    UNRESPONSIVE = enum.auto()
    INCOMPATIBLE = enum.auto()


class IncompatibleExecutorError(Exception):
    """The executor speaks another protocol or serves another model."""


class PlanRejectedError(Exception):
    """The executor refused a plan: a bug of the scheduler's."""


class SessionEndedError(Exception):
    """This stream is over; open another one."""


class Handler(Protocol):
    """Who decides; called from the client's loop, never concurrently."""

    def on_describe(self, info: pb.DescribeResponse) -> None:
        """Check an executor before opening. Raises IncompatibleExecutorError."""

    def on_new_epoch(self, epoch: int) -> None:
        """All rows and blocks are gone; plans in flight will never have results."""

    def on_result(self, result: pb.StepResult) -> None:
        """The next result, in step order."""

    def on_state(self, state: LinkState, message: str) -> None:
        """The link's state or its reason changed; plans may be sent while READY."""


@dataclass(frozen=True, slots=True)
class LinkTimeouts:
    """When a silent or stuck executor counts as lost [s]."""

    heartbeat_s: float = 4.0
    progress_s: float = 60.0


class ExecutorClient:
    """One link, through all its streams and epochs."""

    def __init__(
        self, target: str, handler: Handler, timeouts: LinkTimeouts, *, strict: bool = False
    ) -> None:
        """Talk to `target` ("unix:/path" or "host:port").

        Args:
            target: gRPC target of the executor.
            handler: gets descriptions, epochs, results and states.
            timeouts: for telling a lost executor.
            strict: raise PlanRejectedError out of `run` instead of starting a new epoch (tests).
        """
        self.scheduler_id = secrets.randbits(63) | 1
        self.epoch = 0
        self._target = target
        self._handler = handler
        self._timeouts = timeouts
        self._strict = strict
        self._sent: deque[pb.StepPlan] = deque()  # and not yet answered
        self._oldest_since = time.monotonic()  # when the oldest of _sent became the oldest
        self._outbox: asyncio.Queue[pb.RunRequest] = asyncio.Queue()
        self._wants_reset = False
        self._state = LinkState.CONNECTING
        self._last_step_id = 0  # of the last result in this epoch

    @property
    def num_in_flight(self) -> int:
        """Plans sent whose results have not come."""
        return len(self._sent)

    @property
    def is_ready(self) -> bool:
        """Whether plans may be sent."""
        return self._state is LinkState.READY

    def send(self, plan: pb.StepPlan) -> None:
        """Send the next plan of the current epoch; it is kept until its result comes."""
        assert self.is_ready
        assert plan.epoch == self.epoch, (plan.epoch, self.epoch)
        if not self._sent:
            self._oldest_since = time.monotonic()
        self._sent.append(plan)
        self._outbox.put_nowait(pb.RunRequest(plan=plan))

    async def run(self) -> None:
        """Keep a session open until cancelled."""
        while True:
            try:
                await self._session()
            except IncompatibleExecutorError as error:
                self._set_state(LinkState.INCOMPATIBLE, str(error))
            except SessionEndedError as error:
                if self._state is not LinkState.UNRESPONSIVE:
                    self._set_state(LinkState.CONNECTING, str(error))
            except grpc.aio.AioRpcError as error:
                self._on_rpc_error(error)
            await asyncio.sleep(RETRY_S)

    def _on_rpc_error(self, error: grpc.aio.AioRpcError) -> None:
        message = f"{error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            self._set_state(LinkState.INCOMPATIBLE, message)
        elif self._state is not LinkState.UNRESPONSIVE:
            self._set_state(LinkState.CONNECTING, message)

    def _set_state(self, state: LinkState, message: str = "") -> None:
        if state is not self._state or state is not LinkState.READY:
            self._state = state
            self._handler.on_state(state, message)

    # ---- one session

    async def _session(self) -> None:
        """Describe, open, resend, then pump frames until the stream ends or goes silent."""
        async with grpc.aio.insecure_channel(self._target, LINK_OPTIONS) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            info = await stub.Describe(
                pb.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S, wait_for_ready=False
            )
            if info.protocol_version != EXECUTOR_PROTOCOL_VERSION:
                raise IncompatibleExecutorError(
                    f"the executor speaks protocol {info.protocol_version}, "
                    f"this scheduler {EXECUTOR_PROTOCOL_VERSION}"
                )
            self._handler.on_describe(info)
            stream: Stream = stub.Run()
            try:
                await self._open(stream, info.model_digest)
                await self._pump(stream)
            finally:
                stream.cancel()

    async def _open(self, stream: Stream, model_digest: str) -> None:
        last_committed = self._sent[0].step_id - 1 if self._sent else self._last_step_id
        await stream.write(
            pb.RunRequest(
                open=pb.Open(
                    protocol_version=EXECUTOR_PROTOCOL_VERSION,
                    scheduler_id=self.scheduler_id,
                    epoch=self.epoch,
                    last_committed_step_id=last_committed,
                    reset=self._wants_reset,
                    model_digest=model_digest,
                )
            )
        )
        opened = (await self._read(stream, DESCRIBE_TIMEOUT_S)).opened
        self._wants_reset = False
        self._outbox = asyncio.Queue()
        if opened.epoch != self.epoch:
            self.epoch = opened.epoch
            self._sent.clear()
            self._last_step_id = 0
            self._handler.on_new_epoch(opened.epoch)
        for plan in self._sent:
            if plan.step_id > opened.applied_step_id:
                self._outbox.put_nowait(pb.RunRequest(plan=plan))
        self._oldest_since = time.monotonic()
        self._set_state(LinkState.READY)

    async def _read(self, stream: Stream, timeout_s: float) -> pb.RunResponse:
        try:
            async with asyncio.timeout(timeout_s):
                frame = await stream.read()
        except TimeoutError:
            self._set_state(LinkState.UNRESPONSIVE, f"silent for {timeout_s:g} s")
            raise SessionEndedError("silent") from None
        if frame is grpc.aio.EOF:
            raise SessionEndedError(f"stream ended: {await stream.details()}")
        return frame  # type: ignore[return-value]  # EOF was excluded

    async def _pump(self, stream: Stream) -> None:
        tasks = [asyncio.create_task(self._write(stream)), asyncio.create_task(self._beat())]
        try:
            while True:
                self._on_frame(await self._read(stream, self._timeouts.heartbeat_s))
                self._check_progress()
        finally:
            for task in tasks:
                task.cancel()

    async def _write(self, stream: Stream) -> None:
        outbox = self._outbox
        while True:
            try:
                await stream.write(await outbox.get())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader sees why

    async def _beat(self) -> None:
        outbox = self._outbox
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            outbox.put_nowait(pb.RunRequest(heartbeat=pb.Heartbeat()))

    def _on_frame(self, frame: pb.RunResponse) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "result":
            self._on_result(frame.result)
        elif kind == "rejected":
            self._wants_reset = True
            reason = f"plan {frame.rejected.step_id} rejected: {frame.rejected.reason}"
            logger.error("%s", reason)
            if self._strict:
                raise PlanRejectedError(reason)
            raise SessionEndedError(reason)
        elif kind == "fault":
            self._wants_reset = True
            raise SessionEndedError(f"executor fault: {frame.fault.message}")

    def _on_result(self, result: pb.StepResult) -> None:
        if result.epoch != self.epoch or not self._sent or result.step_id < self._sent[0].step_id:
            return  # a resent one that came twice
        assert result.step_id == self._sent[0].step_id, "results out of order"
        self._sent.popleft()
        self._oldest_since = time.monotonic()
        self._last_step_id = result.step_id
        self._handler.on_result(result)

    def _check_progress(self) -> None:
        stuck_s = time.monotonic() - self._oldest_since
        if self._sent and stuck_s > self._timeouts.progress_s:
            step_id = self._sent[0].step_id
            self._set_state(
                LinkState.UNRESPONSIVE, f"step {step_id} has not ended for {stuck_s:.0f} s"
            )
            raise SessionEndedError("no progress")

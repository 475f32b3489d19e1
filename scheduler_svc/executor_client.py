"""The step stream to one executor: open, window, resend, heartbeats. No policy.

The scheduler's side of the contract in executor.proto. The client never gives up: while no
executor answers it keeps trying, says why, and goes on when one appears.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import grpc

from blockyard.common.grpc_options import short_reason
from blockyard.common.link_security import PLAIN, LinkSecurity
from blockyard.common.process import ProcessUsage
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION, HEARTBEAT_INTERVAL_S
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc

logger = logging.getLogger(__name__)

RETRY_S = 0.2

Stream = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]


class LinkState(enum.Enum):
    """The executor as this client sees it; the names are those of WatchExecutorResponse.State."""

    CONNECTING = enum.auto()
    READY = enum.auto()
    UNRESPONSIVE = enum.auto()
    INCOMPATIBLE = enum.auto()


_STATES = {
    grpc.StatusCode.FAILED_PRECONDITION: LinkState.INCOMPATIBLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: LinkState.UNRESPONSIVE,
}
"""What the end of a call says of the executor; others: it is not there, or not yet."""


class IncompatibleExecutorError(Exception):
    """The executor speaks another protocol or serves another model."""


class PlanRejectedError(Exception):
    """The executor refused a plan: a bug of the scheduler's."""


class SessionEndedError(Exception):
    """This stream is over; open another one."""

    def __init__(self, reason: str, state: LinkState = LinkState.CONNECTING) -> None:
        """Carry why it ended, and what the link's state is until the next one opens."""
        super().__init__(reason)
        self.state = state


class Handler(Protocol):
    """Who decides; called from the client's loop, never concurrently."""

    def on_describe(self, info: pb.DescribeResponse) -> None:
        """Check an executor before opening. Raises IncompatibleExecutorError."""

    def on_new_epoch(self, epoch: int) -> None:
        """All rows and blocks are gone; plans in flight will never have results."""

    def on_result(self, result: pb.StepResult) -> None:
        """The next result, in step order."""

    def on_cost_model(self, cost_model: pb.CostModel) -> None:
        """The executor's newest prices."""

    def on_state(self, state: LinkState, message: str) -> None:
        """The link's state or its reason changed; plans may be sent while READY."""


@dataclass(frozen=True, slots=True)
class LinkTimeouts:
    """When a silent or stuck executor counts as lost, and how often that is looked at [s]."""

    heartbeat_s: float = 4.0
    progress_s: float = 60.0
    beat_s: float = HEARTBEAT_INTERVAL_S


class ExecutorClient:
    """One link, through all its streams and epochs."""

    def __init__(
        self,
        target: str,
        handler: Handler,
        timeouts: LinkTimeouts,
        *,
        security: LinkSecurity = PLAIN,
        executor_name: str = "",
        strict: bool = False,
    ) -> None:
        """Talk to `target` ("unix:/path" or "host:port").

        Args:
            target: gRPC target of the executor.
            handler: gets descriptions, epochs, results and states.
            timeouts: for telling a lost executor.
            security: how to connect.
            executor_name: what the executor's certificate must be for, if not the target's host.
            strict: raise PlanRejectedError out of `run` instead of starting a new epoch (tests).
        """
        self.scheduler_id = secrets.randbits(63) | 1
        self.epoch = 0
        self.executor_usage = ProcessUsage(0.0, 0)
        """Of the executor's process, as its last heartbeat said."""
        self._target = target
        self._security = security
        self._executor_name = executor_name
        self._handler = handler
        self._timeouts = timeouts
        self._strict = strict
        self._sent: deque[pb.StepPlan] = deque()  # and not yet answered
        self._silent_s = 0.0  # since the last frame
        self._stuck_s = 0.0  # since the last result, while plans were in flight
        self._outbox: asyncio.Queue[pb.RunRequest | SessionEndedError] = asyncio.Queue()
        self._wants_reset = False
        self._state, self._message = LinkState.CONNECTING, ""
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
        self._sent.append(plan)
        self._outbox.put_nowait(pb.RunRequest(plan=plan))

    def reset(self, reason: str) -> None:
        """End the session and open again with a new epoch: what was planned is lost."""
        self._wants_reset = True
        self._outbox.put_nowait(SessionEndedError(reason))

    async def run(self) -> None:
        """Keep a session open until cancelled."""
        while True:
            try:
                await self._session()
            except IncompatibleExecutorError as error:
                self._set_state(LinkState.INCOMPATIBLE, str(error))
            except SessionEndedError as error:
                self._set_state(error.state, str(error))
            except grpc.aio.AioRpcError as error:
                state = _STATES.get(error.code(), LinkState.CONNECTING)
                self._set_state(state, short_reason(error, self._target))
            await asyncio.sleep(RETRY_S)

    def _set_state(self, state: LinkState, message: str = "") -> None:
        """Tell the handler what is new; an executor that stays lost is news each time."""
        is_new = (state, message) != (self._state, self._message)
        self._state, self._message = state, message
        if is_new or state is LinkState.UNRESPONSIVE:
            self._handler.on_state(state, message)

    # ---- one session

    async def _session(self) -> None:
        """Describe, open, resend, then pump frames until the stream ends or goes silent."""
        async with self._security.channel(self._target, self._executor_name) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            # Refused at once if nobody listens; no answer in time from a frozen process.
            info = await stub.Describe(pb.DescribeRequest(), timeout=self._timeouts.heartbeat_s)
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
        try:
            async with asyncio.timeout(self._timeouts.heartbeat_s):
                opened = (await self._read(stream)).opened
        except TimeoutError:
            raise SessionEndedError("no answer to Open", LinkState.UNRESPONSIVE) from None
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
        self._silent_s = self._stuck_s = 0.0
        self._set_state(LinkState.READY)

    async def _read(self, stream: Stream) -> pb.RunResponse:
        try:
            frame = await stream.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC's way to say that the call was cancelled; nobody cancelled this task.
            raise SessionEndedError("the call was cancelled") from None
        if frame is grpc.aio.EOF:
            raise SessionEndedError(f"stream ended: {await stream.details()}")
        return frame  # type: ignore[return-value]  # EOF was excluded

    async def _pump(self, stream: Stream) -> None:
        """Read, write and beat until one of them ends the session.

        Not in a task group: one that ends for an error swallows a cancellation meanwhile.
        """
        works = (self._receive(stream), self._write(stream), self._beat())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:  # what the executor said comes first
            if task in ended and not task.cancelled():
                task.result()  # raises: they end only for an error
        raise SessionEndedError("the call was cancelled")  # by gRPC, in a task that was writing

    async def _receive(self, stream: Stream) -> None:
        while True:
            self._on_frame(await self._read(stream))

    async def _write(self, stream: Stream) -> None:
        outbox = self._outbox
        while True:
            frame = await outbox.get()
            if isinstance(frame, SessionEndedError):
                raise frame
            try:
                await stream.write(frame)
            except asyncio.InvalidStateError:
                raise SessionEndedError("the call has ended") from None

    async def _beat(self) -> None:
        """Send heartbeats, and find out whether the executor is silent or stuck.

        Time is counted in beats of this loop: if this process itself was stopped or slow, the
        executor's frames are waiting to be read and it must not be blamed.
        """
        outbox, timeouts = self._outbox, self._timeouts
        while True:
            await asyncio.sleep(timeouts.beat_s)
            outbox.put_nowait(pb.RunRequest(heartbeat=pb.Heartbeat()))
            self._silent_s += timeouts.beat_s
            self._stuck_s += timeouts.beat_s if self._sent else 0.0
            if self._silent_s >= timeouts.heartbeat_s:
                reason = f"silent for {self._silent_s:g} s"
                raise SessionEndedError(reason, LinkState.UNRESPONSIVE)
            if self._stuck_s >= timeouts.progress_s:
                reason = f"step {self._sent[0].step_id} has not ended for {self._stuck_s:g} s"
                raise SessionEndedError(reason, LinkState.UNRESPONSIVE)

    def _on_frame(self, frame: pb.RunResponse) -> None:
        self._silent_s = 0.0
        kind = frame.WhichOneof("frame")
        if kind == "result":
            self._on_result(frame.result)
        elif kind == "heartbeat":
            beat = frame.heartbeat
            self.executor_usage = ProcessUsage(beat.cpu_seconds, beat.resident_bytes)
            self._handler.on_cost_model(beat.cost_model)
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
        self._stuck_s = 0.0
        self._last_step_id = result.step_id
        self._handler.on_result(result)

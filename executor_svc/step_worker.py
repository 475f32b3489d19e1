"""The two threads that run steps: one launches plans in order, the other waits for their results.

The event loop hands plans in and gets events back, in step order, and never touches the device.
The launching thread never waits for a result: while the completion thread waits for step N, step
N+1 is checked, applied and launched.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Final, Protocol

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc import plan_check
from executor_svc.cost_model import StepSamples
from executor_svc.plan import Plan, PlanError, decode
from executor_svc.row_state import RowState, TokenLog
from executor_svc.runner import (
    FatalDeviceError,
    PendingStep,
    Runner,
    RunnerInfo,
    StepBatch,
    StepOutputs,
)

_STOP_TIMEOUT_S: Final = 5.0

log = logging.getLogger(__name__)


class StepEvents(Protocol):
    """What the worker tells its owner; all called on the event loop."""

    def on_result(self, result: pb.StepResult) -> None:
        """A step completed."""

    def on_rejected(self, rejected: pb.PlanRejected) -> None:
        """A plan broke the contract; nothing of it was applied."""

    def on_fault(self, fault: pb.Fault, *, is_fatal: bool) -> None:
        """The epoch is over; if fatal, so is this process."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step between launch and completion. Times in nanoseconds."""

    plan: Plan
    batch: StepBatch
    pending: PendingStep
    growing_logs: list[tuple[TokenLog, int]]
    queue_ns: int
    apply_ns: int

    def complete(self) -> tuple[pb.StepResult, StepOutputs]:
        """Wait for the step. Its tokens also go to the histories of rows that keep one."""
        outputs = self.pending.wait()
        for token_log, index in self.growing_logs:
            token_log.append(int(outputs.token_ids[index]))
        result = pb.StepResult(
            epoch=self.plan.epoch,
            step_id=self.plan.step_id,
            token_ids=outputs.token_ids.tolist(),
            failed_rows=[row for row, _ in outputs.failed_rows],
            failed_status=[status for _, status in outputs.failed_rows],
            candidate_token_ids=outputs.candidate_token_ids.tolist(),
            candidate_logprobs=outputs.candidate_logprobs.tolist(),
            token_logprobs=outputs.token_logprobs.tolist(),
            timings=pb.StepTimings(
                queue_ns=self.queue_ns,
                apply_ns=self.apply_ns,
                forward_ns=outputs.forward_ns,
                sample_ns=outputs.sample_ns,
                idle_ns=outputs.idle_ns,
                move_ns=outputs.move_ns,
            ),
        )
        return result, outputs


def launch(plan: Plan, state: RowState, runner: Runner, arrival_ns: int) -> LaunchedStep:
    """Check, apply and launch one plan.

    Args:
        plan: the next one; epoch and step id are not looked at.
        state: the rows, changed unless PlanError is raised.
        runner: the device.
        arrival_ns: when the plan came in, on the clock of time.monotonic_ns.

    Raises PlanError, before anything changed, or what Runner.launch raises.
    """
    start_ns = time.monotonic_ns()
    plan_check.check(plan, state, runner.info)
    batch = state.apply(plan)
    growing_logs = state.growing_logs(batch)
    apply_ns = time.monotonic_ns() - start_ns
    pending = runner.launch(plan, state, batch)
    return LaunchedStep(plan, batch, pending, growing_logs, start_ns - arrival_ns, apply_ns)


@dataclass(frozen=True, slots=True)
class _Arrival:
    epoch: int
    step_id: int
    plan: Plan | PlanError  # decoded, or why it cannot be
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class _Reset:
    epoch: int


@dataclass(frozen=True, slots=True)
class _Fence:
    """Passed on when all steps launched before it have completed."""

    reached: threading.Event


@dataclass(frozen=True, slots=True)
class _Failure:
    fault: pb.Fault
    is_fatal: bool


_Outgoing = LaunchedStep | pb.PlanRejected | _Failure | _Fence | None


class StepWorker:
    """Runs plans on a runner, one epoch after another."""

    def __init__(self, runner: Runner, events: StepEvents) -> None:
        """Takes the runner over: from `start` on nobody else may call it."""
        self._runner = runner
        self._events = events
        self._state = RowState(runner.info)
        self._samples = StepSamples(runner.info)
        self._inbox: SimpleQueue[_Arrival | _Reset | None] = SimpleQueue()
        self._outbox: SimpleQueue[_Outgoing] = SimpleQueue()
        self._launched_step_id = 0
        # Plans of other epochs are dropped. The event loop writes it, the launching thread reads.
        self._epoch = 0
        # The epoch, if any, in which either thread met a fault: nothing more of it is launched.
        self._faulted_epoch = 0
        # The last epoch whose fault was reported: no event of it may follow. Completion thread's.
        self._closed_epoch = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = [
            threading.Thread(target=self._run_launches, name="launch", daemon=True),
            threading.Thread(target=self._run_completions, name="completion", daemon=True),
        ]

    @property
    def info(self) -> RunnerInfo:
        """The runner's."""
        return self._runner.info

    def cost_model(self) -> pb.CostModel:
        """Fitted now, from recent steps; takes a fraction of a millisecond."""
        return self._samples.fit()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads; events are called on `loop`."""
        self._loop = loop
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads after the steps under way; blocks. A step that hangs is left behind."""
        self._inbox.put(None)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def begin_epoch(self, epoch: int) -> None:
        """Drop all rows; plans of earlier epochs that were not launched are dropped as well."""
        self._epoch = epoch
        self._inbox.put(_Reset(epoch))

    def submit(self, plan: pb.StepPlan) -> None:
        """Queue a plan of the current epoch: one event answers it, unless the epoch ends first.

        It is decoded here, while the step before it runs: the launching thread's time between two
        steps may be the device's.
        """
        arrival_ns = time.monotonic_ns()
        try:
            decoded: Plan | PlanError = decode(plan)
        except PlanError as error:
            decoded = error
        self._inbox.put(_Arrival(plan.epoch, plan.step_id, decoded, arrival_ns))

    def _run_launches(self) -> None:
        while (item := self._inbox.get()) is not None:
            if isinstance(item, _Reset):
                self._guard(item.epoch, 0, self._reset, self._outbox.put)
            elif item.epoch == self._epoch != self._faulted_epoch:
                work = partial(self._launch, item)
                self._guard(item.epoch, item.step_id, work, self._outbox.put)
        self._outbox.put(None)

    def _reset(self) -> None:
        fence = _Fence(threading.Event())
        self._outbox.put(fence)
        fence.reached.wait()
        self._state.reset()
        self._launched_step_id = 0
        self._runner.reset()

    def _launch(self, item: _Arrival) -> None:
        expected = self._launched_step_id + 1
        try:
            if item.step_id != expected:  # it was queued behind a plan that was refused
                raise PlanError(f"step {item.step_id} follows a rejected plan")
            if isinstance(item.plan, PlanError):
                raise item.plan
            step = launch(item.plan, self._state, self._runner, item.arrival_ns)
        except PlanError as error:
            self._outbox.put(rejection(item.epoch, item.step_id, expected, error))
            return
        self._launched_step_id = expected
        self._outbox.put(step)

    def _run_completions(self) -> None:
        while (item := self._outbox.get()) is not None:
            if isinstance(item, _Fence):
                item.reached.set()
            elif isinstance(item, _Failure):
                self._report(item)
            elif isinstance(item, pb.PlanRejected):
                self._post(item.epoch, partial(self._events.on_rejected, item))
            else:
                plan = item.plan
                self._guard(plan.epoch, plan.step_id, partial(self._complete, item), self._report)

    def _complete(self, step: LaunchedStep) -> None:
        result, outputs = step.complete()
        self._samples.add(step.plan, step.batch, outputs.forward_ns + outputs.sample_ns)
        self._post(result.epoch, partial(self._events.on_result, result))

    def _report(self, failure: _Failure) -> None:
        on_fault = partial(self._events.on_fault, failure.fault, is_fatal=failure.is_fatal)
        self._post(failure.fault.epoch, on_fault)
        self._closed_epoch = failure.fault.epoch

    def _post(self, epoch: int, event: Callable[[], None]) -> None:
        assert self._loop is not None, "events before start"
        if epoch != self._closed_epoch and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(event)

    def _guard(
        self,
        epoch: int,
        step_id: int,
        work: Callable[[], None],
        report: Callable[[_Failure], None],
    ) -> None:
        """Run `work`; whatever it raises ends the epoch, and a lost device the process."""
        try:
            work()
        except FatalDeviceError as error:
            failure = _Failure(_fault(epoch, step_id, error), is_fatal=True)
        except Exception as error:  # the edge to the device: whatever fails there is a fault
            log.error("step failed", exc_info=error, extra={"fields": {"step_id": step_id}})
            failure = _Failure(_fault(epoch, step_id, error), is_fatal=False)
        else:
            return
        self._faulted_epoch = epoch
        report(failure)


def rejection(epoch: int, step_id: int, expected_step_id: int, error: PlanError) -> pb.PlanRejected:
    """The answer to a plan that was not applied."""
    return pb.PlanRejected(
        epoch=epoch,
        step_id=step_id,
        expected_step_id=expected_step_id,
        reason=error.reason,
    )


def _fault(epoch: int, step_id: int, error: Exception) -> pb.Fault:
    return pb.Fault(epoch=epoch, step_id=step_id, message=f"{type(error).__name__}: {error}")

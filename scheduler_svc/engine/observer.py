"""Who watches the engine at work: tracing and metrics, each only if it is wanted."""

from __future__ import annotations

import time

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.engine.metrics.recorder import MetricsRecorder
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Finished, StepOutput, StepPlan


class EngineObserver:
    """Told of everything, after it was done unless said otherwise; decides nothing."""

    def __init__(self, tracing: EngineTracing | None, recorder: MetricsRecorder | None) -> None:
        """None: not wanted."""
        self._tracing = tracing
        self._recorder = recorder

    # ---- requests

    def queued(self, request: Request, submit: pb.Submit) -> None:
        """A request was queued."""
        if not submit.HasField("trace"):
            return
        if self._tracing is not None:
            self._tracing.submitted(request, submit.trace)
        if self._recorder is not None:
            self._recorder.queued(request, submit.trace.trace_id)

    def aborted(self, request: Request) -> None:
        """Nobody wants the request's output any more."""
        if self._tracing is not None:
            self._tracing.ended(request)
        if self._recorder is not None:
            self._recorder.aborted(request)

    def expired(self, request: Request) -> None:
        """The request was dropped for its deadline, before its prefill."""
        if self._tracing is not None:
            self._tracing.ended(request)
        if self._recorder is not None:
            self._recorder.expired(request)

    def finished(self, finished: Finished) -> None:
        """A branch ended by itself, perhaps the last one of its request."""
        if self._recorder is not None:
            self._recorder.finished(finished, time.monotonic_ns())
        if self._tracing is not None and finished.is_last:
            self._tracing.ended(finished.request, finished.status, finished.error_message)

    # ---- steps

    def planned(self, plan: StepPlan, scheduler: Scheduler, times_ns: tuple[int, int, int]) -> None:
        """A plan was sent; `times_ns`: planning began, was done, and the plan was encoded."""
        if self._tracing is not None:
            self._tracing.planned(plan, times_ns[0])
        if self._recorder is not None:
            self._recorder.planned(plan, scheduler, times_ns)

    def arrived(self, scheduler: Scheduler, now_ns: int) -> None:
        """A result came; what it says is not committed yet."""
        if self._recorder is not None:
            self._recorder.arrived(scheduler.in_flight[0], scheduler.rows, now_ns)

    def committed(
        self,
        result: executor_pb2.StepResult,
        output: StepOutput,
        times_ns: tuple[int, int, int],
        *,
        is_resting: bool,
    ) -> None:
        """A result was committed, and the next plan sent if there is something to do.

        Args:
            result: it.
            output: what came of it.
            times_ns: it arrived, its commit began, and was done.
            is_resting: nothing is in flight.
        """
        arrived_ns, began_ns, done_ns = times_ns
        if self._tracing is not None:
            self._tracing.committed(result, output.finished, arrived_ns, done_ns)
        if self._recorder is not None:
            self._recorder.committed(result.timings, done_ns - began_ns, is_resting=is_resting)

    def epoch_ended(self) -> None:
        """The executor was lost, and what was in flight with it; or the first one opened."""
        if self._tracing is not None:
            self._tracing.epoch_ended()
        if self._recorder is not None:
            self._recorder.epoch_ended()

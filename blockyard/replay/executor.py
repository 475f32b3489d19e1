"""The executor's half: recorded plans go through an executor that checks content.

Decode, plan_check and row_state are those of every executor; the device is the checking runner.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.replay.difference import Difference, Steps, compare
from executor_svc.backends.checking.runner import DEVICE, FakeOptions, FakeRunner
from executor_svc.plan import Plan, PlanError, decode
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, RunnerInfo, StepBatch
from executor_svc.step_worker import launch
from scheduler_svc.plan_log_reader import Event


class _Device(FakeRunner):
    """Lets the rows fail that failed in the recording."""

    def __init__(self, info: RunnerInfo) -> None:
        self.failed_rows: list[int] = []
        self._failing_seeds: set[int] = set()
        super().__init__(info, FakeOptions(nan_seeds=self._failing_seeds))

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch."""
        self._failing_seeds.clear()
        self._failing_seeds.update(state.seeds[self.failed_rows].tolist())
        return super().launch(plan, state, batch)


class ExecutorReplay:
    """Feed it every event of a log, in order, until it returns a difference."""

    def __init__(self, steps: Steps) -> None:
        """Nothing has run yet; `steps` says which results to compare."""
        self.num_plans = 0
        self.num_compared = 0
        self._steps = steps
        self._recorded_on = ""
        self._epoch = 0
        self._next_step_id = 1
        self._device: _Device | None = None
        self._state: RowState | None = None
        # A plan runs when its recorded result comes up, which says what rows failed.
        self._waiting: deque[pb.StepPlan] = deque()

    @property
    def summary(self) -> str:
        """What was found so far."""
        if self._recorded_on == DEVICE:
            return f"{self.num_plans} plans legal, {self.num_compared} results identical"
        device = self._recorded_on or "no executor"
        return f"{self.num_plans} plans legal; results not compared, they are of {device}"

    @property
    def is_done(self) -> bool:
        """Whether the last result to compare was compared."""
        return self._steps.are_over(self.num_plans)

    def apply(self, event: Event) -> Difference | None:
        """Take what happened next; returns what came out otherwise, after which it must end."""
        if isinstance(event, log_pb.EpochBegin):
            difference = self.finish()
            self._begin_epoch(event)
            return difference
        if isinstance(event, pb.StepPlan):
            self._waiting.append(event)
        elif isinstance(event, pb.StepResult):
            return self._run(event)
        return None

    def finish(self) -> Difference | None:
        """The epoch ends here; plans that had no result must be legal, too."""
        while self._waiting:
            if (difference := self._run(None)) is not None:
                return difference
        return None

    def _begin_epoch(self, event: log_pb.EpochBegin) -> None:
        known = event.executor.DESCRIPTOR.fields_by_name
        names = (field.name for field in dataclasses.fields(RunnerInfo) if field.name in known)
        info = RunnerInfo(**{name: getattr(event.executor, name) for name in names})
        self._recorded_on = info.device
        self._epoch, self._next_step_id = event.epoch, 1
        self._device, self._state = _Device(info), RowState(info)

    def _run(self, recorded: pb.StepResult | None) -> Difference | None:
        """Run the oldest waiting plan; `recorded` is its result, None if it had none."""
        assert self._device is not None, "the reader has seen an epoch begin"
        assert self._state is not None
        plan = self._waiting.popleft()
        self.num_plans += 1
        expected = (self._epoch, self._next_step_id)
        if (plan.epoch, plan.step_id) != expected:
            return self._difference(plan, [f"illegal: epoch and step_id must be {expected}"])
        self._next_step_id += 1
        self._device.failed_rows = list(recorded.failed_rows) if recorded is not None else []
        try:
            result, _ = launch(decode(plan), self._state, self._device, arrival_ns=0).complete()
        except PlanError as error:
            return self._difference(plan, [f"illegal: {error}"])
        if recorded is None or self._recorded_on != DEVICE or self.num_plans < self._steps.first:
            return None
        result.ClearField("timings")  # they are of another day, perhaps of another machine
        if recorded.HasField("timings"):
            result.timings.CopyFrom(recorded.timings)
        self.num_compared += 1
        if details := list(compare(recorded, result)):
            return self._difference(plan, [f"result.{detail}" for detail in details])
        return None

    def _difference(self, plan: pb.StepPlan, details: list[str]) -> Difference:
        return Difference(self.num_plans, plan.epoch, plan.step_id, details)

"""Scheduler's and executor's ends of the step stream as plain calls, for the random walk.

What executor_client and the executor's service do over gRPC is done here one message at a time, so
that the walk decides what arrives when, what is lost, and what is sent again. Messages pass through
their serialised form.
"""

from __future__ import annotations

from collections import deque

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.runner import Runner
from executor_svc.step_ledger import StepLedger
from integration_tests.fake_executor import SyncExecutor


class SimLink:
    """One link, through cuts and executor restarts."""

    def __init__(self, runner: Runner) -> None:
        """Open to a new executor around `runner`; its epoch is `epoch`."""
        self.executor = SyncExecutor(runner)
        self.num_resent = 0
        self.num_replayed = 0
        self._sent: deque[pb.StepPlan] = deque()  # and not answered
        self._last_step_id = 0  # of the last result taken
        self._to_executor: deque[bytes] = deque()
        self._to_scheduler: deque[bytes] = deque()

    @property
    def epoch(self) -> int:
        """The executor's."""
        return self.executor.epoch

    @property
    def num_sent(self) -> int:
        """Plans sent whose results were not taken."""
        return len(self._sent)

    @property
    def has_plan_under_way(self) -> bool:
        """Whether `deliver` has something to deliver."""
        return bool(self._to_executor)

    @property
    def has_result_under_way(self) -> bool:
        """Whether `take` has something to take."""
        return bool(self._to_scheduler)

    def send(self, plan: pb.StepPlan) -> None:
        """Put the next plan of the epoch on its way."""
        self._sent.append(plan)
        self._to_executor.append(plan.SerializeToString())

    def deliver(self) -> None:
        """Let the executor take the oldest plan under way. Raises PlanError."""
        plan = pb.StepPlan.FromString(self._to_executor.popleft())
        if self.executor.launch(plan):
            return
        if (kept := self._ledger.kept(plan.step_id)) is not None:
            self._to_scheduler.append(kept.SerializeToString())

    def complete(self) -> None:
        """Let the executor finish its oldest step in flight; the result is then under way."""
        self._to_scheduler.append(self.executor.complete().SerializeToString())

    def take(self) -> pb.StepResult | None:
        """The oldest result under way; None if it had been taken before."""
        result = pb.StepResult.FromString(self._to_scheduler.popleft())
        if not self._sent or result.step_id < self._sent[0].step_id:
            return None
        assert result.step_id == self._sent[0].step_id, "results out of order"
        self._sent.popleft()
        self._last_step_id = result.step_id
        return result

    def cut(self, *, resends_all: bool) -> None:
        """Lose everything under way, then reopen the same epoch.

        Args:
            resends_all: resend plans that the executor says it has, too; it must not mind.
        """
        self._to_executor.clear()
        self._to_scheduler.clear()
        last_committed = self._sent[0].step_id - 1 if self._sent else self._last_step_id
        assert self._ledger.can_resume(self.epoch, last_committed), "nothing was lost for good"
        for result in self._ledger.kept_after(last_committed):
            self._to_scheduler.append(result.SerializeToString())
            self.num_replayed += 1
        for plan in self._sent:
            if resends_all or plan.step_id > self._ledger.applied_step_id:
                self._to_executor.append(plan.SerializeToString())
                self.num_resent += 1

    def replace_executor(self, runner: Runner) -> None:
        """The executor is lost with all it had; open to a new one."""
        self._sent.clear()
        self._to_executor.clear()
        self._to_scheduler.clear()
        self._last_step_id = 0
        self.executor = SyncExecutor(runner)

    @property
    def _ledger(self) -> StepLedger:
        return self.executor.ledger

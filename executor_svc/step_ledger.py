"""Which steps of the current epoch were accepted and completed, and the results kept for resending.

No threads and no I/O: the service asks it on the event loop what a plan's step id calls for.
"""

from __future__ import annotations

import time
from collections import deque

from blockyard.common.protocol import KEPT_RESULTS, MAX_WINDOW
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import PlanError

NO_EPOCH = 0


class StepLedger:
    """Step ids of one epoch after another."""

    def __init__(self) -> None:
        self._last_epoch = NO_EPOCH
        self.epoch = NO_EPOCH
        self.applied_step_id = 0
        self.completed_step_id = 0
        self._kept: deque[pb.StepResult] = deque(maxlen=KEPT_RESULTS)

    def begin_epoch(self) -> int:
        """Forget all steps. Epochs increase strictly, over restarts of the process as well."""
        self._last_epoch = max(time.time_ns(), self._last_epoch + 1)
        self.epoch = self._last_epoch
        self.applied_step_id = self.completed_step_id = 0
        self._kept.clear()
        return self.epoch

    def end_epoch(self) -> None:
        """After a fault: no plan is accepted until the next epoch begins."""
        self.epoch = NO_EPOCH

    def accept(self, epoch: int, step_id: int) -> bool:
        """Whether the plan is the next one and now counts as applied; False: it is known already.

        Raises PlanError for another epoch, a gap, a plan beyond the widest window, or a step whose
        result is no longer kept.
        """
        if self.epoch == NO_EPOCH or epoch != self.epoch:
            raise PlanError(f"epoch {epoch}: the current one is {self.epoch}")
        if step_id > self.applied_step_id + 1:
            raise PlanError(f"step {step_id} leaves a gap")
        if step_id == self.applied_step_id + 1:
            # Buffers of steps take turns: one more under way would overwrite the first one's.
            if step_id > self.completed_step_id + MAX_WINDOW:
                raise PlanError(f"step {step_id}: {MAX_WINDOW} plans are under way already")
            self.applied_step_id = step_id
            return True
        if step_id <= self.completed_step_id and self.kept(step_id) is None:
            raise PlanError(f"step {step_id}: its result is no longer kept")
        return False

    def withdraw(self, step_id: int) -> None:
        """An accepted plan was refused when it was checked: neither it nor later ones count."""
        self.applied_step_id = min(self.applied_step_id, step_id - 1)

    def complete(self, result: pb.StepResult) -> bool:
        """Keep a result; False if it belongs to an epoch that is over."""
        if result.epoch != self.epoch:
            return False
        assert result.step_id == self.completed_step_id + 1, "results come in step order"
        self.completed_step_id = result.step_id
        self._kept.append(result)
        return True

    def kept(self, step_id: int) -> pb.StepResult | None:
        """The result of `step_id`, if it is complete and still kept."""
        return next((result for result in self._kept if result.step_id == step_id), None)

    def kept_after(self, step_id: int) -> list[pb.StepResult]:
        """Kept results later than `step_id`, in order."""
        return [result for result in self._kept if result.step_id > step_id]

    def can_resume(self, epoch: int, last_committed_step_id: int) -> bool:
        """Whether a scheduler that committed so far can go on in `epoch` and miss no result."""
        oldest_kept = self.completed_step_id - len(self._kept)
        return (
            self.epoch != NO_EPOCH
            and epoch == self.epoch
            and oldest_kept <= last_committed_step_id <= self.completed_step_id
        )

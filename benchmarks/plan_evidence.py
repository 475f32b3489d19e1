"""What an engine's plan log shows of how it served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blockyard.engine.v1 import plan_log_pb2
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.plan_log_reader import PlanLogReader


@dataclass(slots=True)
class Evidence:
    """Counts over a whole log."""

    num_epochs: int = 0
    num_steps: int = 0  # that compute
    max_rows: int = 0  # in one step
    max_tokens: int = 0  # in one step
    max_plans_in_flight: int = 0
    num_swapped_out: int = 0  # blocks
    num_swapped_in: int = 0  # blocks


def read(path: Path) -> Evidence:
    """Count what one file of a log holds. Raises PlanLogError, OSError."""
    found = Evidence()
    num_rows = num_in_flight = 0
    for event in PlanLogReader([path]):
        if isinstance(event, plan_log_pb2.EpochBegin):
            found.num_epochs += 1
            num_rows = num_in_flight = 0
        elif isinstance(event, executor_pb2.StepPlan):
            num_in_flight += 1
            found.max_plans_in_flight = max(found.max_plans_in_flight, num_in_flight)
            num_rows = num_rows if event.batch.same else len(event.batch.rows)
            _add(found, event, num_rows)
        elif isinstance(event, executor_pb2.StepResult):
            num_in_flight -= 1
    return found


def _add(found: Evidence, plan: executor_pb2.StepPlan, num_rows: int) -> None:
    num_tokens = sum(plan.batch.num_scheduled_tokens) or num_rows
    found.num_steps += num_rows > 0
    found.max_rows = max(found.max_rows, num_rows)
    found.max_tokens = max(found.max_tokens, num_tokens)
    found.num_swapped_out += len(plan.swap_out.src)
    found.num_swapped_in += len(plan.swap_in.src)

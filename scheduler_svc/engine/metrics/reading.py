"""What one scrape reads from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from blockyard.common.process import ProcessUsage
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.metrics.frontends import FrontendTotals
from scheduler_svc.engine.metrics.recorder import MetricsRecorder


@dataclass(frozen=True, slots=True)
class Reading:
    """All processes as the engine knows them between two steps.

    `snapshot` is a copy, so that its figures belong together; what was recorded goes on while an
    answer is written, each family by itself in one go.
    """

    model_name: str
    snapshot: pb.SnapshotResponse
    recorder: MetricsRecorder
    frontends: FrontendTotals
    num_frontends: int  # connected
    is_executor_ready: bool
    engine_loop_lag_s: float
    engine_usage: ProcessUsage
    executor_usage: ProcessUsage


class MetricsSource(Protocol):
    """Who can be read: the engine."""

    def read_metrics(self) -> Reading | None:
        """Everything as it is now; None before an executor has opened: nothing is known yet."""

"""Something to scrape whose figures the test sets."""

from __future__ import annotations

from typing import Any

from blockyard.common.process import ProcessUsage
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.metrics.frontends import FrontendTotals
from scheduler_svc.engine.metrics.reading import Reading
from scheduler_svc.engine.metrics.recorder import MetricsRecorder

SNAPSHOT = pb.SnapshotResponse(
    num_waiting=3,
    num_deferred=1,
    num_running=5,
    num_waiting_tokens=96,
    estimated_wait_ns=1_500_000_000,
    block_size=16,
    device=pb.DevicePool(
        num_slots=1616,
        num_stored=700,
        num_in_flight=12,
        num_unused=88,
        num_cached=320,
        num_free=480,
        num_padding=16,
        num_saved_by_sharing=64,
    ),
    host=pb.HostPool(num_slots=160, num_swapped=48, num_cached=32, num_free=80),
    counters=pb.Counters(
        num_finished=101,
        num_recoveries=102,
        num_preemptions_by_recompute=103,
        num_preemptions_by_swap=104,
        num_queried_tokens=1000,
        num_hit_tokens_device=105,
        num_hit_tokens_host=106,
        num_evicted=107,
        num_copied=108,
        num_swapped_out=109,
        num_swapped_in=110,
        num_prompt_tokens=111,
        num_output_tokens=2**53,
        num_steps=113,
        num_expired=114,
    ),
)


class FakeSource:
    """An engine that is ready and idle unless told otherwise."""

    def __init__(
        self, snapshot: pb.SnapshotResponse = SNAPSHOT, model: str = "tiny", **fields: Any
    ) -> None:
        """`fields` are Reading's."""
        self.num_readings = 0
        self.is_ready = True
        self.recorder = MetricsRecorder()
        self.frontends = FrontendTotals()
        self._fields = {
            "model_name": model,
            "snapshot": snapshot,
            "recorder": self.recorder,
            "frontends": self.frontends,
            "num_frontends": 2,
            "is_executor_ready": True,
            "engine_loop_lag_s": 0.25,
            "engine_usage": ProcessUsage(1.5, 1000),
            "executor_usage": ProcessUsage(2.5, 2000),
            **fields,
        }

    def read_metrics(self) -> Reading | None:
        """See MetricsSource."""
        self.num_readings += 1
        return Reading(**self._fields) if self.is_ready else None

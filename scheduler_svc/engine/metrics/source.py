"""The engine as a scrape reads it."""

from __future__ import annotations

from typing import Final

from blockyard.common.process import process_usage
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.metrics.reading import Reading
from scheduler_svc.telemetry.loop_lag import LoopLag

LAG_PERIOD_S: Final = 0.5
"""A look costs 20 us, and that must stay little beside the steps."""


class EngineMetricsSource:
    """Reads an engine that records; see MetricsSource."""

    def __init__(self, engine: Engine) -> None:
        """Read this engine, on its own loop."""
        self.lag = LoopLag(LAG_PERIOD_S)
        """How late that loop is; somebody must run it."""
        self._engine = engine

    def read_metrics(self) -> Reading | None:
        """Everything as it is now; None before an executor has opened, or if nobody records."""
        engine = self._engine
        state = engine.state()
        if engine.recorder is None or not state.ready:
            return None
        return Reading(
            model_name=state.model_name,
            snapshot=engine.snapshot(),
            recorder=engine.recorder,
            frontends=engine.frontends,
            num_frontends=engine.num_frontends,
            is_executor_ready=engine.client.is_ready,
            engine_loop_lag_s=self.lag.value_s,
            engine_usage=process_usage(),
            executor_usage=engine.client.executor_usage,
        )

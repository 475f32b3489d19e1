"""The engine's own entry point with stopwatches: `python -m benchmarks.measured_engine OUT FLAGS`.

The engine runs as it is; its scheduler, codec and links are subclassed or wrapped here. What was
measured is written to OUT (.npz) when the process ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from typing import Final
from unittest import mock

import numpy as np

from blockyard.engine.v1 import engine_pb2
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc import plan_codec
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine import __main__ as entry
from scheduler_svc.engine import loop
from scheduler_svc.engine.executor_limits import limits_of
from scheduler_svc.engine.link import FrontendLink
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepOutput, StepPlan, StepTokens

_LAG_PERIOD_S: Final = 0.005

PLAN_COLUMNS: Final = ("plan_ns", "encode_ns", "plan_bytes", "num_rows", "num_changed_rows")
RESULT_COLUMNS: Final = (
    *("decode_ns", "commit_ns", "result_bytes", "publish_ns"),
    *("idle_ns", "queue_ns", "apply_ns", "cpu_ns", "time_ns"),
)
LAG_COLUMNS: Final = ("time_ns", "lag_ns")


class Recorder:
    """One row per plan, per result and per look at the loop's lateness; plain appends."""

    def __init__(self) -> None:
        self.plans: list[tuple[int, ...]] = []
        self.results: list[tuple[int, ...]] = []
        self.lags: list[tuple[int, int]] = []
        self.frame_ns: list[int] = []
        self.plan_ns = 0
        self.num_changed_rows = 0
        self.result: tuple[int, ...] = ()
        self.commit_ns = 0

    def save(self, path: str) -> None:
        """Write arrays plans [steps, PLAN_COLUMNS], results, lags, frame_ns."""
        np.savez(
            path,
            plans=np.array(self.plans, np.int64).reshape(-1, len(PLAN_COLUMNS)),
            results=np.array(self.results, np.int64).reshape(-1, len(RESULT_COLUMNS)),
            lags=np.array(self.lags, np.int64).reshape(-1, len(LAG_COLUMNS)),
            frame_ns=np.array(self.frame_ns, np.int64),
        )


class MeasuredScheduler(Scheduler):
    """Times plan and commit."""

    def __init__(self, limits: Limits, policy: Policy, recorder: Recorder) -> None:
        super().__init__(limits, policy)
        self._recorder = recorder

    def plan(self, now_ns: int) -> StepPlan | None:
        """As Scheduler.plan."""
        start_ns = time.perf_counter_ns()
        plan = super().plan(now_ns)
        self._recorder.plan_ns = time.perf_counter_ns() - start_ns
        return plan

    def commit(self, result: StepTokens) -> StepOutput:
        """As Scheduler.commit."""
        start_ns = time.perf_counter_ns()
        output = super().commit(result)
        self._recorder.commit_ns = time.perf_counter_ns() - start_ns
        return output


class MeasuredCodec:
    """Times encode and decode, and counts the bytes that travel."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def encode(self, plan: StepPlan) -> pb.StepPlan:
        """As plan_codec.encode."""
        recorder = self._recorder
        start_ns = time.perf_counter_ns()
        message = plan_codec.encode(plan)
        encode_ns = time.perf_counter_ns() - start_ns
        num_changed_rows = len(plan.new_rows) + len(plan.freed_rows)
        recorder.plans.append(
            (recorder.plan_ns, encode_ns, message.ByteSize(), len(plan.rows), num_changed_rows)
        )
        return message

    def decode(self, message: pb.StepResult) -> StepTokens:
        """As plan_codec.decode."""
        start_ns = time.perf_counter_ns()
        result = plan_codec.decode(message)
        decode_ns = time.perf_counter_ns() - start_ns
        timings = message.timings
        self._recorder.result = (
            *(decode_ns, message.ByteSize()),
            *(timings.idle_ns, timings.queue_ns, timings.apply_ns),
        )
        return result


class MeasuredLink(FrontendLink):
    """Times the building of frames."""

    def __init__(self, recorder: Recorder, index: int, name: str) -> None:
        super().__init__(index, name)
        self._recorder = recorder

    def _take(self) -> engine_pb2.OutputBatch:
        start_ns = time.perf_counter_ns()
        batch = super()._take()
        self._recorder.frame_ns.append(time.perf_counter_ns() - start_ns)
        return batch


class MeasuredEngine(loop.Engine):
    """Times publishing, and watches how late the event loop is."""

    def __init__(
        self, recorder: Recorder, settings: EngineSettings, tracing: EngineTracing | None
    ) -> None:
        super().__init__(settings, tracing)
        self._recorder = recorder
        self._lag_task = asyncio.get_running_loop().create_task(self._watch_lag())

    def on_new_epoch(self, epoch: int) -> None:
        """As Engine.on_new_epoch, on a measured scheduler."""
        if self.scheduler is None and self._info is not None:
            limits = limits_of(self._info, self._settings)
            self.scheduler = MeasuredScheduler(limits, self._policy, self._recorder)
        super().on_new_epoch(epoch)

    def on_result(self, result: pb.StepResult) -> None:
        """As Engine.on_result; the row is complete only when it returns."""
        recorder = self._recorder
        super().on_result(result)
        decode_ns, result_bytes, *timings = recorder.result
        recorder.results.append(
            (
                *(decode_ns, recorder.commit_ns, result_bytes, self._publish_ns, *timings),
                *(time.process_time_ns(), time.monotonic_ns()),
            )
        )

    def _publish(self, output: StepOutput) -> None:
        start_ns = time.perf_counter_ns()
        super()._publish(output)
        self._publish_ns = time.perf_counter_ns() - start_ns

    async def _watch_lag(self) -> None:
        while True:
            due_ns = time.monotonic_ns() + int(_LAG_PERIOD_S * 1e9)
            await asyncio.sleep(_LAG_PERIOD_S)
            now_ns = time.monotonic_ns()
            self._recorder.lags.append((now_ns, max(0, now_ns - due_ns)))


def main(path: str, flags: list[str]) -> int:
    """Run the engine with these flags, then write `path`; returns the engine's exit code."""
    recorder = Recorder()
    with (
        mock.patch.object(entry, "Engine", partial(MeasuredEngine, recorder)),
        mock.patch.object(loop, "plan_codec", MeasuredCodec(recorder)),
        mock.patch.object(loop, "FrontendLink", partial(MeasuredLink, recorder)),
    ):
        exit_code = entry.main(flags)
    recorder.save(path)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

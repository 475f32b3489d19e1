"""A simulated executor that does one thing after another: `python -m benchmarks.serial_executor`.

Like a CPU backend, it computes inside `launch`: each step keeps the interpreter busy for
--busy-ms and sleeps until --step-ms have passed; only then does it look at the next plan. The
device is idle whenever no step is inside `launch`. Other flags: integration_tests.fake_executor.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import uvloop

from blockyard.common import logs
from executor_svc.backends.checking.runner import FakeRunner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, RunnerInfo, StepBatch, StepOutputs
from executor_svc.server import serve
from integration_tests.fake_executor import make_runner, parse_arguments


class _DoneStep:
    def __init__(self, outputs: StepOutputs) -> None:
        self._outputs = outputs

    def wait(self) -> StepOutputs:
        return self._outputs


class SerialRunner:
    """A fake runner's tokens, at the pace of a device that starts a step when one is launched."""

    def __init__(self, tokens: FakeRunner, busy_s: float, step_s: float) -> None:
        """`tokens` must be instant."""
        self._tokens = tokens
        self._busy_s = busy_s
        self._step_s = step_s
        self._end_s = 0.0

    @property
    def info(self) -> RunnerInfo:
        """The fake runner's."""
        return self._tokens.info

    def reset(self) -> None:
        """See Runner.reset."""
        self._tokens.reset()
        self._end_s = 0.0

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch; returns when the step is over."""
        start_s = time.monotonic()
        idle_s = start_s - self._end_s if self._end_s else 0.0
        outputs = self._tokens.launch(plan, state, batch).wait()
        while time.monotonic() < start_s + self._busy_s:
            pass
        time.sleep(max(0.0, start_s + self._step_s - time.monotonic()))
        self._end_s = time.monotonic()
        forward_s = self._end_s - start_s
        return _DoneStep(
            replace(outputs, forward_ns=int(forward_s * 1e9), idle_ns=int(idle_s * 1e9))
        )


def main() -> None:
    """Serve until a signal."""
    flags = parse_arguments(sys.argv[1:])
    logs.configure("executor")
    busy_s, step_s = flags.busy_ms / 1e3, flags.step_ms / 1e3
    flags.busy_ms = flags.step_ms = 0.0
    uvloop.run(serve(SerialRunner(make_runner(flags), busy_s, step_s), flags.listen))


if __name__ == "__main__":
    main()

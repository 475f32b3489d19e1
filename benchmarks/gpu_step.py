"""Where a step's time goes on a GPU: `python -m benchmarks.gpu_step --model llama-8b`.

The runner alone, in this process, on random weights: no gRPC, no scheduler. Plans are decoded,
checked and applied as the service does it; two steps are under way, as with window 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import report
from benchmarks.dummy_models import SHAPES, write_model
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, Runner, RunnerInfo, StepBatch
from executor_svc.tests.plan_driver import PlanDriver
from executor_svc.tests.plans import appends, batch, new_rows

_CONTEXT: Final = 1024
_NUM_STEPS: Final = 40
_WARM_UP: Final = 8
_DECODE_ROWS: Final = (1, 8, 32, 64, 128, 256)
_MIXED: Final = ((0, 2048), (0, 8192), (128, 1024), (256, 1536), (256, 7936))
"""Decode rows, tokens of new prompts beside them."""
_PROMPT: Final = 1024
_FIRST_NEW: Final = max(_DECODE_ROWS)  # row of new prompts


class TimedRunner:
    """A runner that notes how long it takes to enqueue a step: the host's own part of it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.launches_s: list[float] = []

    @property
    def info(self) -> RunnerInfo:
        """The runner's."""
        return self._runner.info

    def reset(self) -> None:
        """A new epoch."""
        self._runner.reset()

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner; waits for no device."""
        begin = time.perf_counter()
        step = self._runner.launch(plan, state, batch)
        self.launches_s.append(time.perf_counter() - begin)
        return step


class Stepper:
    """Rows of random tokens; launches steps two deep and times them."""

    def __init__(self, driver: PlanDriver, runner: TimedRunner) -> None:
        self.driver = driver
        self._runner = runner
        self._rng = np.random.default_rng(0)

    def prompt(self, length: int) -> list[int]:
        """Random token ids."""
        vocab_size = self.driver.runner.info.vocab_size
        return [int(token) for token in self._rng.integers(0, vocab_size, length)]

    def begin(self, rows: Sequence[int], length: int) -> None:
        """Prefill rows one by one."""
        for row in rows:
            self.driver.begin(row, self.prompt(length), chunk=4096)

    def mixed(self, rows: Sequence[int], num_new: int) -> Callable[[], PendingStep]:
        """A step of decode rows and of new prompts of 1,024 tokens, which end with the next one."""
        driver = self.driver
        lengths = [_PROMPT] * (num_new // _PROMPT) + [num_new % _PROMPT] * (num_new % _PROMPT > 0)
        new = list(range(_FIRST_NEW, _FIRST_NEW + len(lengths)))
        prompts = [self.prompt(length) for length in lengths]
        blocks = [driver.take(length) for length in lengths]
        has_begun = False

        def launch() -> PendingStep:
            nonlocal has_begun
            full = [r for r in rows if driver.lengths[r] % driver.runner.info.block_size == 0]
            grown = appends(*((row, driver.take(1)) for row in full))
            for row in rows:
                driver.lengths[row] += 1
            begun = [
                {"row": row, "tokens": tokens, "blocks": ids}
                for row, tokens, ids in zip(new, prompts, blocks, strict=True)
            ]
            counts = [(row, 1) for row in rows]
            counts += list(zip(new, lengths, strict=True))
            freed = new if has_begun else []
            has_begun = True
            return driver.launch(
                freed_rows=freed,
                appends=grown,
                new_rows=new_rows(*begun),
                batch=batch(*counts, num_decode_rows=len(rows)),
            )

        return launch

    def time(self, launch: Callable[[], PendingStep]) -> dict[str, float]:
        """Medians of one kind of step, in milliseconds.

        host_ms is all that the host does, the making of a plan included; launch_ms is enqueueing.
        """
        pending: deque[PendingStep] = deque()
        ends, hosts, outputs = [], [], []
        for _ in range(_WARM_UP + _NUM_STEPS):
            begin = time.perf_counter()
            pending.append(launch())
            hosts.append(time.perf_counter() - begin)
            if len(pending) == 2:
                outputs.append(pending.popleft().wait())
                ends.append(time.perf_counter())
        outputs += [step.wait() for step in pending]
        steps = np.diff(ends)[_WARM_UP:]
        measured = outputs[_WARM_UP:]
        return {
            "step_ms": round(1e3 * statistics.median(steps), 3),
            "forward_ms": round(statistics.median(o.forward_ns for o in measured) / 1e6, 3),
            "sample_ms": round(statistics.median(o.sample_ns for o in measured) / 1e6, 3),
            "idle_ms": round(statistics.median(o.idle_ns for o in measured) / 1e6, 3),
            "host_ms": round(1e3 * statistics.median(hosts[_WARM_UP:]), 3),
            "launch_ms": round(1e3 * statistics.median(self._runner.launches_s[-_NUM_STEPS:]), 3),
        }


def measure(runner: TimedRunner) -> list[dict[str, Any]]:
    """All kinds of steps, smallest first; prints each at once."""
    driver = PlanDriver(runner)
    stepper, found = Stepper(driver, runner), []
    num_begun = 0
    for num_rows in _DECODE_ROWS:
        stepper.begin(range(num_begun, num_rows), _CONTEXT)
        num_begun = num_rows
        rows = list(range(num_rows))
        times = stepper.time(partial(driver.launch_decode, *rows))
        found.append({"decode_rows": num_rows, "new_tokens": 0, **times})
        print(found[-1], flush=True)
    for num_rows, num_new in _MIXED:
        live = np.flatnonzero(driver.state.is_live)
        driver.run(freed_rows=live[live >= _FIRST_NEW].tolist())
        times = stepper.time(stepper.mixed(list(range(num_rows)), num_new))
        found.append({"decode_rows": num_rows, "new_tokens": num_new, **times})
        print(found[-1], flush=True)
    return found


def main() -> int:
    """Measure one model; writes results/gpu_step_MODEL.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__)
    parser.add_argument("--model", default="llama-8b", choices=sorted(SHAPES))
    flags = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), flags.model)
        options = CudaOptions(16, 512, 8192, 16384, is_dummy=True)
        runner = load_runner(path, options, lambda stage, done: _say(begin, stage, done))
    pool = runner.info.num_device_blocks * runner.info.block_bytes
    results = {
        "model": flags.model,
        "device": runner.info.device,
        "start_up_s": round(time.perf_counter() - begin, 1),
        "kv_pool_gib": round(pool / 2**30, 1),
        "device_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "steps": measure(TimedRunner(runner)),
    }
    print({k: v for k, v in results.items() if k != "steps"}, flush=True)
    report.write(f"gpu_step_{flags.model}", results, [])
    return 0


def _say(begin: float, stage: str, done: float) -> None:
    if done in (0.0, 1.0):
        print(f"{time.perf_counter() - begin:6.1f} s  {stage} {done:.0%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

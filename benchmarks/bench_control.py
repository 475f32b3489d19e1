"""What scheduling costs, without a model: `python -m benchmarks.bench_control`.

A simulated executor process keeps Python busy for 2 ms of every step and sleeps to 5 ms; the engine
is the real one, in its own process, on a unix socket; this process stands for the front ends. Two
executors: "serial" computes while it launches, as the CPU backend does; "overlapped" has a device
that runs one step while the next is launched.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import uvloop

from benchmarks import report
from benchmarks.control_core import measure_core
from benchmarks.engine_driver import EngineDriver, engine_driver
from benchmarks.measured_engine import PLAN_COLUMNS, RESULT_COLUMNS
from benchmarks.processes import ProcessError, Processes, processes
from benchmarks.report import Target, percentiles

BUSY_MS: Final = 2.0
STEP_MS: Final = 5.0
_MODULES: Final = {
    "serial": "benchmarks.serial_executor",
    "overlapped": "integration_tests.fake_executor",
}
_CHURN_OUTPUT_TOKENS: Final = 10
"""Each row lives for ten steps: a tenth of them leave, and a tenth join, in every step."""
_CHURN_SPARE_REQUESTS: Final = 64
_SKIPPED_STEPS: Final = 50
_BLOCK_SIZE: Final = 16
_NS_PER_US: Final = 1e3

Columns = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one pair of processes."""

    name: str
    num_rows: int = 256
    context_tokens: int = 2000
    window: int = 2
    executor: Literal["serial", "overlapped"] = "serial"
    has_churn: bool = False


STEADY: Final = Case("256 rows x 2,000 tokens")
OVERLAPPED: Final = Case("256 x 2,000, overlapped, window 2", executor="overlapped")
CASES: Final = (
    STEADY,
    Case("256 x 2,000, window 1", window=1),
    Case("256 x 2,000, window 3", window=3),
    Case("256 x 2,000, overlapped, window 1", window=1, executor="overlapped"),
    OVERLAPPED,
    Case("256 x 2,000, overlapped, window 3", window=3, executor="overlapped"),
    Case("256 x 200", context_tokens=200),
    Case("256 x 8,000", context_tokens=8000),
    Case("1,024 x 2,000", num_rows=1024),
    Case("256 x 200, 10 % join and leave", context_tokens=200, has_churn=True),
)


async def run_case(case: Case, num_steps: int) -> Columns:
    """Run one case on fresh processes; returns the columns of its measured steps."""
    async with processes() as children:
        await _start(children, case, num_steps)
        async with engine_driver(children.socket("engine")) as driver:
            await _drive(driver, case, num_steps)
        await children.stop("engine")
        await children.stop("executor")
        with np.load(children.run_dir / "engine.npz") as arrays:
            columns = _align(arrays["plans"], arrays["results"])
    keep = _measured_steps(case, columns)
    return {name: values[keep][-num_steps:] for name, values in columns.items()}


async def _start(children: Processes, case: Case, num_steps: int) -> None:
    longest = case.context_tokens + num_steps + 1000
    num_blocks = case.num_rows * (longest // _BLOCK_SIZE + 1) + 1
    executor, engine = children.socket("executor"), children.socket("engine")
    flags = {
        "--listen": executor,
        "--num-device-blocks": num_blocks,
        "--max-rows": case.num_rows,
        "--max-model-len": longest,
        "--max-num-batched-tokens": max(65536, case.num_rows),
        "--busy-ms": BUSY_MS,
        "--step-ms": STEP_MS,
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    arguments.append("--no-check-content")
    await children.start("executor", _MODULES[case.executor], arguments, executor)
    arguments = [
        str(children.run_dir / "engine.npz"),
        *("--listen", engine, "--executor", executor, "--strict"),
        *("--max-num-seqs", str(case.num_rows), "--window", str(case.window)),
    ]
    await children.start("engine", "benchmarks.measured_engine", arguments, engine)


async def _drive(driver: EngineDriver, case: Case, num_steps: int) -> None:
    """Submit the case's requests and wait until enough steps have run."""
    rng = np.random.default_rng(3)

    def submit(count: int, limits: list[int]) -> None:
        # Rows that reach the end of a block in different steps, as in real traffic.
        prompts = case.context_tokens + rng.integers(-8, 8, count)
        driver.submit(prompts.tolist(), limits)

    def replace(count: int) -> None:
        submit(count, [_CHURN_OUTPUT_TOKENS] * count)

    if case.has_churn:
        # The first ones end one tenth at a time, and so do all that follow.
        count = case.num_rows + _CHURN_SPARE_REQUESTS
        submit(count, [1 + index % _CHURN_OUTPUT_TOKENS for index in range(count)])
    else:
        submit(case.num_rows, [num_steps + 900] * case.num_rows)
    running = asyncio.create_task(driver.run(replace if case.has_churn else None))
    try:
        async with asyncio.timeout(120):
            while driver.num_batches < num_steps + _SKIPPED_STEPS + _prefill_steps(case):
                await asyncio.wait([running], timeout=0.1)
                if running.done():
                    running.result()
    finally:
        running.cancel()


def _prefill_steps(case: Case) -> int:
    return case.num_rows * (case.context_tokens + 8) // 65536 + 3


def _align(plans: npt.NDArray[np.int64], results: npt.NDArray[np.int64]) -> Columns:
    """One row per step: plan and result number n belong together."""
    count = min(len(plans), len(results))
    columns = dict(zip(PLAN_COLUMNS, plans[:count].T, strict=True))
    columns |= zip(RESULT_COLUMNS, results[:count].T, strict=True)
    columns["step_cpu_ns"] = np.diff(columns["cpu_ns"], prepend=0)
    columns["period_ns"] = np.diff(columns["time_ns"], prepend=0)
    return columns


def _measured_steps(case: Case, columns: Columns) -> npt.NDArray[np.bool_]:
    """Which steps count [steps]: full batches after a warm-up; steady cases: nothing changes."""
    keep = columns["num_rows"] >= case.num_rows * (0.6 if case.has_churn else 1)
    if not case.has_churn:
        keep &= columns["num_changed_rows"] == 0
    keep[:_SKIPPED_STEPS] = False
    return keep


def summarise(columns: Columns) -> dict[str, dict[str, float]]:
    """Percentiles of what the table shows, in us and bytes."""
    plan_encode = columns["plan_ns"] + columns["encode_ns"]
    commit = columns["decode_ns"] + columns["commit_ns"]
    times = {
        "plan_encode_us": plan_encode,
        "commit_us": commit,
        **{f"{name}_us": columns[f"{name}_ns"] for name in ("publish", "idle", "queue", "apply")},
        "engine_cpu_us": columns["step_cpu_ns"],
        "period_us": columns["period_ns"],
    }
    summary = {name: percentiles(values, _NS_PER_US) for name, values in times.items()}
    for name in ("plan_bytes", "result_bytes", "num_changed_rows"):
        summary[name] = percentiles(columns[name])
    return summary


def print_cases(summaries: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table: p50 / p95 / p99 where the tail matters."""

    def spread(values: dict[str, float]) -> str:
        return " / ".join(f"{values[p]:.0f}" for p in ("p50", "p95", "p99"))

    names = ("plan_encode_us", "commit_us", "publish_us", "idle_us", "engine_cpu_us")
    headers = ("case", *names, "plan B", "result B", "period ms")
    rows = [
        (
            case,
            *(spread(summary[name]) for name in names),
            *(summary[name]["mean"] for name in ("plan_bytes", "result_bytes")),
            summary["period_us"]["p50"] / 1e3,
        )
        for case, summary in summaries.items()
    ]
    report.print_table("Per step: p50 / p95 / p99 (bytes: mean)", headers, rows)


def targets(summaries: dict[str, dict[str, dict[str, float]]]) -> list[Target]:
    """The design's cost targets, at 256 rows and window 2."""
    steady, overlapped = summaries[STEADY.name], summaries[OVERLAPPED.name]
    at_200, at_8000 = (
        summaries[name]["plan_encode_us"]["p50"] + summaries[name]["commit_us"]["p50"]
        for name in ("256 x 200", "256 x 8,000")
    )
    return [
        Target("plan + encode, p50", steady["plan_encode_us"]["p50"], "<=", 150, "us"),
        Target("commit, p50", steady["commit_us"]["p50"], "<=", 150, "us"),
        Target("bytes to the executor, mean", steady["plan_bytes"]["mean"], "<=", 1200, "B"),
        Target("bytes from the executor, mean", steady["result_bytes"]["mean"], "<=", 1200, "B"),
        Target("device idle, p50, serial", steady["idle_us"]["p50"], "<=", 300, "us"),
        Target("device idle, p50, overlapped", overlapped["idle_us"]["p50"], "<=", 300, "us"),
        Target("cost at 8,000 tokens / at 200 tokens", at_8000 / at_200, "<=", 1.5, "x"),
    ]


async def measure(repeats: int, num_steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """All cases, repeated in turn so that a noisy minute hits them alike."""
    steps: dict[str, list[Columns]] = {case.name: [] for case in CASES}
    for repeat in range(repeats):
        for case in CASES:
            print(f"repeat {repeat + 1} of {repeats}: {case.name}", flush=True)
            steps[case.name].append(await run_case(case, num_steps))
    return {
        name: summarise({key: np.concatenate([run[key] for run in runs]) for key in runs[0]})
        for name, runs in steps.items()
    }


def main() -> int:
    """Measure, print, write results/control.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_control", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="measured per case and repeat")
    flags = parser.parse_args()
    core = {f"{rows} rows": measure_core(rows, 2000, flags.steps) for rows in (256, 1024)}
    try:
        summaries = uvloop.run(measure(flags.repeats, flags.steps))
    except ProcessError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    rows = [(name, *(part["p50"] for part in parts.values())) for name, parts in core.items()]
    report.print_table("Scheduler and codec alone, one process, p50", ("", *core["256 rows"]), rows)
    print_cases(summaries)
    reached = targets(summaries)
    are_met = report.print_targets(reached)
    results: dict[str, Any] = {
        "executor": {"busy_ms": BUSY_MS, "step_ms": STEP_MS},
        "cases": {case.name: {**asdict(case), **summaries[case.name]} for case in CASES},
        "core": core,
    }
    report.write("control", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

"""What tracing and metrics cost: `python -m benchmarks.tracing_cost`.

Three systems side by side, each an executor that computes nothing, an engine and a front end: one
without tracing and metrics, one that traces 1 % of requests and steps, one that traces all. They
are loaded for a second or two at a time, in turn and in changing order, so that noise of the
machine hits them alike. Counted is CPU time, of all threads, from one turn of a system to its
next, so what the exporter does is in it; what the system takes at rest is subtracted:

    rest        nothing to do; CPU of engine and front end, by second
    scrape      one answer of the metrics endpoint; CPU of the engine
    steps       256 rows decode; CPU of the engine, by step
    requests    short calls through the front end; CPU of engine and front end, by request
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import uvloop

from benchmarks import report
from benchmarks.bench_streams import write_model_dir
from benchmarks.engine_driver import EngineDriver, engine_driver
from benchmarks.processes import ProcessError, Processes, cpu_ns, processes
from benchmarks.report import Target
from blockyard.client import AsyncClient, BlockyardError
from integration_tests.mesh.peer import free_port

NUM_ROWS: Final = 256
RATIOS: Final = {"off": None, "1 %": 0.01, "100 %": 1.0}
LOADS: Final = ("rest", "scrape", "steps", "requests")
MAX_STEP_US: Final = 20.0
MAX_REQUEST_US: Final = 150.0

_NUM_IN_FLIGHT: Final = 32
_OUTPUT_TOKENS: Final = 8
_PROMPT_TOKENS: Final = 32
_STEP_MS: Final = 1.0
_NUM_SCRAPES: Final = 5
_REST_S: Final = 3.0
_SETTLE_S: Final = 1.2
"""Longer than the exporter's period: the spans of the last turn are sent within it."""


@dataclass(frozen=True, slots=True)
class System:
    """One of the systems, and how to load it."""

    engine_pid: int
    frontend_pid: int
    driver: EngineDriver
    client: AsyncClient
    metrics_url: str  # empty: it has none

    def pids(self, load: str) -> Sequence[int]:
        """Whose CPU time counts."""
        is_engine_alone = load in ("scrape", "steps")
        return (self.engine_pid,) if is_engine_alone else (self.engine_pid, self.frontend_pid)

    async def run(self, load: str, count: int) -> None:
        """One turn of `count` steps, requests or scrapes."""
        if load == "steps":
            await self._steps(count)
        elif load == "requests":
            await self._requests(count)
        else:
            for _ in range(count if self.metrics_url else 0):
                await asyncio.to_thread(_scrape, self.metrics_url)

    async def _steps(self, num_steps: int) -> None:
        """Decode 256 rows for so many steps."""
        target = self.driver.num_finished + NUM_ROWS
        self.driver.submit([_PROMPT_TOKENS] * NUM_ROWS, [num_steps] * NUM_ROWS)
        while self.driver.num_finished < target:  # noqa: ASYNC110 - the driver counts
            await asyncio.sleep(0.01)

    async def _requests(self, num_requests: int) -> None:
        """Serve so many calls."""
        left = iter(range(num_requests))

        async def call_until_done() -> None:
            for number in left:
                prompt = [100 + number % 800] * _PROMPT_TOKENS
                await self.client.complete(
                    token_ids=prompt, max_tokens=_OUTPUT_TOKENS, temperature=0, ignore_eos=True
                )

        await asyncio.gather(*(call_until_done() for _ in range(_NUM_IN_FLIGHT)))


def _scrape(url: str) -> None:
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert answer.status == 200


@contextlib.asynccontextmanager
async def running_system(
    children: Processes, name: str, ratio: float | None
) -> AsyncIterator[System]:
    """Start one system whose processes are called `name`-something."""
    executor, engine = children.socket(f"{name}-executor"), children.socket(f"{name}-engine")
    flags = ["--listen", executor, "--max-rows", str(NUM_ROWS), "--no-check-content"]
    flags += ["--num-device-blocks", "65536", "--max-model-len", "4096"]
    flags += ["--max-num-batched-tokens", "65536", "--step-ms", str(_STEP_MS)]
    await children.start(f"{name}-executor", "integration_tests.fake_executor", flags, executor)
    tracing, metrics, url = list[str](), list[str](), ""
    if ratio is not None:
        address = f"127.0.0.1:{free_port()}"
        tracing = ["--otlp-endpoint", children.socket("sink"), "--trace-sample-ratio", str(ratio)]
        metrics, url = ["--metrics-address", address], f"http://{address}/metrics"
    flags = ["--listen", engine, "--executor", executor, "--strict", *tracing, *metrics]
    engine_pid = await children.start(f"{name}-engine", "scheduler_svc.engine", flags, engine)
    model_path, front = children.run_dir / "model", children.socket(f"{name}-frontend")
    flags = ["--engine", engine, "--listen", front, "--model-dir", str(model_path), *tracing]
    pid = await children.start(f"{name}-frontend", "scheduler_svc.frontend", flags, front)
    async with engine_driver(engine) as driver, AsyncClient(front, timeout=60) as client:
        driving = asyncio.create_task(driver.run())
        yield System(engine_pid, pid, driver, client, url)
        driving.cancel()


Times = dict[str, list[float]]
"""By system, one for each round [us]."""


async def rest(systems: dict[str, System], num_rounds: int) -> dict[str, Times]:
    """CPU time of a second at rest of those processes that each load counts, all at once."""
    times: dict[str, Times] = {load: {name: [] for name in systems} for load in LOADS}
    for _ in range(num_rounds):
        begin_s = time.monotonic()
        begin_us = {load: {n: _cpu_us(s.pids(load)) for n, s in systems.items()} for load in LOADS}
        await asyncio.sleep(_REST_S)
        elapsed_s = time.monotonic() - begin_s
        for load, by_name in begin_us.items():
            for name, us in by_name.items():
                used_us = _cpu_us(systems[name].pids(load)) - us
                times[load][name].append(used_us / elapsed_s)
    return times


async def in_turn(
    systems: dict[str, System],
    load: str,
    count: int,
    num_rounds: int,
    rest_us: dict[str, float],
) -> Times:
    """CPU time of one step, request or scrape, above rest; a first round is thrown away."""
    orders = list(itertools.permutations(systems))
    random.Random(1).shuffle(orders)
    times: Times = {name: [] for name in systems}
    begun: dict[str, tuple[float, float]] = {}  # by system: when its turn began, and CPU time then

    def end_turn(name: str) -> None:
        now_s, now_us = time.monotonic(), _cpu_us(systems[name].pids(load))
        if name in begun:
            begin_s, begin_us = begun[name]
            used_us = now_us - begin_us - (now_s - begin_s) * rest_us[name]
            times[name].append(used_us / count)
        begun[name] = now_s, now_us

    for number in range(num_rounds + 1):
        print(f"{load}: round {number} of {num_rounds}", flush=True)
        for name in orders[number % len(orders)]:
            end_turn(name)
            await systems[name].run(load, count)
    await asyncio.sleep(_SETTLE_S)
    for name in systems:
        end_turn(name)
    return {name: each[1:] for name, each in times.items()}


def _cpu_us(pids: Sequence[int]) -> float:
    return sum(map(cpu_ns, pids)) / 1e3


async def measure(num_rounds: int, num_steps: int, num_requests: int) -> dict[str, Times]:
    """CPU times by load."""
    async with processes() as children, contextlib.AsyncExitStack() as stack:
        write_model_dir(children.run_dir / "model")
        sink = children.socket("sink")
        await children.start("sink", "benchmarks.otlp_sink", [sink], sink)
        systems = {
            name: await stack.enter_async_context(running_system(children, f"s{index}", ratio))
            for index, (name, ratio) in enumerate(RATIOS.items())
        }
        await asyncio.sleep(_SETTLE_S)
        at_rest = await rest(systems, num_rounds)
        times = {"rest": at_rest["rest"]}
        counts = {"scrape": _NUM_SCRAPES, "steps": num_steps, "requests": num_requests}
        for load, count in counts.items():
            rest_us = {name: float(np.median(each)) for name, each in at_rest[load].items()}
            times[load] = await in_turn(systems, load, count, num_rounds, rest_us)
        return times


@dataclass(frozen=True, slots=True)
class Cost:
    """What one system's CPU time is above that of the one without [us]; from pairs of a round."""

    median_us: float  # of the system's own time
    added_us: float  # median of the differences
    standard_error_us: float  # of their mean, for the spread


def cost(times: list[float], base: list[float]) -> Cost:
    """Compare the rounds of a system with those of another, in parallel [n]."""
    added = np.subtract(times, base)
    error = float(added.std(ddof=1) / np.sqrt(len(added)))
    return Cost(float(np.median(times)), float(np.median(added)), error)


def main() -> int:
    """Measure, print, write results/tracing_cost.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of each kind; 10 at least")
    parser.add_argument("--steps", type=int, default=1000, help="of a turn")
    parser.add_argument("--requests", type=int, default=500, help="of a turn")
    flags = parser.parse_args()
    try:
        times = uvloop.run(measure(flags.rounds, flags.steps, flags.requests))
    except (ProcessError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    costs = {
        load: {name: cost(each, by_name["off"]) for name, each in by_name.items()}
        for load, by_name in times.items()
    }
    rows = [
        (f"{load}, {name}", c.median_us, c.added_us, c.standard_error_us)
        for load, by_name in costs.items()
        for name, c in by_name.items()
    ]
    headers = ("", "CPU us", "added us", "standard error us")
    report.print_table(
        "CPU time of a second at rest, of a scrape, a step and a request", headers, rows
    )
    step, request = costs["steps"]["1 %"], costs["requests"]["1 %"]
    reached = [
        Target("pairs of rounds", flags.rounds, ">=", 10),
        Target("added to a step, 1 %", step.added_us, "<=", MAX_STEP_US, "us"),
        Target("added to a request, 1 %", request.added_us, "<=", MAX_REQUEST_US, "us"),
    ]
    are_met = report.print_targets(reached)
    results = {
        "num_rows": NUM_ROWS,
        "num_steps": flags.steps,
        "num_requests": flags.requests,
        "costs": {
            load: {name: asdict(c) for name, c in by_name.items()}
            for load, by_name in costs.items()
        },
        "rounds_us": times,
    }
    report.write("tracing_cost", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

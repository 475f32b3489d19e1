"""More requests than can be served, with deadlines: `python -m benchmarks.simulate_overload`.

Clients cancel at their deadline; the queue is bounded. At 0.7 to 2 times the rate at which all
requests are served when they wait from the start: what is done in time, by deadline and in order
of arrival.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.report import Target
from benchmarks.simulate_cases import PROFILE
from blockyard.simulate.generator import generate
from blockyard.simulate.overload import Demand, Result, serve
from blockyard.simulate.run import simulate
from blockyard.simulate.setup import Setup, Sizes, blocks_in, make_setup
from blockyard.simulate.trace import NS_PER_S, Trace
from scheduler_svc.engine.queue_bound import QueueBound

_KV_GIB: Final = 55
_NUM_REQUESTS: Final = 6000
_SEEDS: Final = (0, 1)
_LOADS: Final = (0.7, 1.0, 1.5, 2.0)
_QUEUES: Final = (300, 1000)
_OVERLOAD: Final = 1.5
"""From this load on there are targets."""
_OF_CAPACITY: Final = 0.9
_OF_ARRIVAL_ORDER: Final = 1.15
_HEADERS: Final = ("", "by arrival", "by deadline", "ratio", "ratio of tokens")


def _patience_ns(trace: Trace) -> dict[str, npt.NDArray[np.int64]]:
    """How long each client waits [num_requests], by the name of the case."""
    num_requests = len(trace)
    return {
        "10, 20 or 40 s": np.random.default_rng(2).choice([10, 20, 40], num_requests) * NS_PER_S,
        "20 s": np.full(num_requests, 20 * NS_PER_S),
        "2 s + 60 ms/token": 2 * NS_PER_S + 60_000_000 * trace.num_output_tokens.astype(np.int64),
    }


def _figures(result: Result, capacity: float) -> dict[str, Any]:
    return {
        **asdict(result),
        "of_capacity": result.goodput / capacity,
        "tokens_per_s_in_time": result.token_goodput,
    }


def _study(seed: int, setup: Setup) -> tuple[dict[str, Any], list[Target]]:
    """Every case with one trace."""
    trace = generate("azure", _NUM_REQUESTS, seed).fitting(setup.limits.max_total_tokens)
    capacity = len(trace) / (simulate(trace.all_at_once(), setup).end_ns / NS_PER_S)
    results: dict[str, Any] = {"requests_per_s": capacity}
    rows, targets = [], []
    for name, patience_ns in _patience_ns(trace).items():
        for queue in _QUEUES:
            bound = QueueBound(max_waiting=queue, max_waiting_tokens=10**9)
            for load in _LOADS:
                at_load = trace.at_rate(load * capacity)
                by_deadline, by_arrival = (
                    _figures(serve(Demand(at_load, patience_ns, bound, tells), setup), capacity)
                    for tells in (True, False)
                )
                ratio = by_deadline["num_in_time"] / by_arrival["num_in_time"]
                of_tokens = by_deadline["num_tokens_in_time"] / by_arrival["num_tokens_in_time"]
                case = f"{name}, queue of {queue}, {load:g}x"
                label = f"seed {seed}, {case}"
                results[case] = {"by_deadline": by_deadline, "by_arrival": by_arrival}
                of_capacity = by_deadline["of_capacity"]
                rows.append((case, by_arrival["of_capacity"], of_capacity, ratio, of_tokens))
                print(f"{label}: {of_capacity:.2f} of capacity", flush=True)
                if load >= _OVERLOAD:
                    targets += [
                        Target(
                            f"seed {seed}, {case}: of capacity", of_capacity, ">=", _OF_CAPACITY
                        ),
                        Target(
                            f"seed {seed}, {case}: of arrival's", ratio, ">=", _OF_ARRIVAL_ORDER
                        ),
                    ]
    report.print_table(f"seed {seed}: {capacity:.1f} requests/s are capacity", _HEADERS, rows)
    return results, targets


def main() -> int:
    """Run the study; returns the exit code."""
    setup = make_setup("blockyard", Sizes(blocks_in(_KV_GIB, 16, PROFILE)), PROFILE)
    results: dict[str, Any] = {}
    targets: list[Target] = []
    for seed in _SEEDS:
        results[f"seed {seed}"], found = _study(seed, setup)
        targets += found
    is_met = report.print_targets(targets)
    report.write("simulate_overload", results, targets)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

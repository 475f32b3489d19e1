"""How fast the simulation is: `python -m benchmarks.simulate_speed`.

A million requests of conversation traffic on one core, and where the time of a shorter run goes.
"""

from __future__ import annotations

import cProfile
import pathlib
import pstats
import resource
import sys
from dataclasses import asdict
from typing import Any, Final

from benchmarks import report
from benchmarks.report import ROOT, Target
from benchmarks.simulate_cases import KV_GIB, PROFILE, parser, run, start
from blockyard.simulate.run import simulate
from blockyard.simulate.setup import Sizes, blocks_in, make_setup

_NUM_REQUESTS: Final = 1_000_000
_NUM_PROFILED: Final = 20_000
_TOP: Final = 20
_LIMIT_S: Final = 1800.0


def _profile_rows(profile: cProfile.Profile) -> list[tuple[str, int, float, float]]:
    """The functions that took longest themselves: name, calls, own and cumulative time [s]."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        (_name(file, function), calls, own_s, total_s)
        for (file, _, function), (_, calls, own_s, total_s, _) in stats.items()
    ]
    return sorted(rows, key=lambda row: -row[2])[:_TOP]


def _name(file: str, function: str) -> str:
    path = pathlib.Path(file)
    if path.is_absolute() and path.is_relative_to(ROOT / ".venv"):
        return f"{path.name}:{function}"
    if path.is_absolute() and path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT)}:{function}"
    return f"{path.name}:{function}"


def main() -> int:
    """Run the study; returns the exit code."""
    arguments = parser(__doc__, "azure")
    arguments.add_argument("--requests", type=int, default=_NUM_REQUESTS)
    flags, trace = start(arguments)
    setup = make_setup("blockyard", Sizes(blocks_in(KV_GIB, 16, PROFILE)), PROFILE)
    profile = cProfile.Profile()
    few = trace.take(_NUM_PROFILED).all_at_once()
    profile.runcall(simulate, few, setup)
    rows = _profile_rows(profile)
    report.print_table(
        f"{_NUM_PROFILED:,} requests under the profiler", ("", "calls", "own s", "all s"), rows
    )
    many = trace.take(flags.requests).all_at_once()
    summary = run(trace.name, many, setup)
    step_us = summary.wall_s / summary.num_steps * 1e6
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.print_table(
        "the whole run",
        ("requests", "steps", "wall s", "us a step", "virtual s", "peak memory GiB"),
        [
            (
                f"{summary.num_requests:,}",
                f"{summary.num_steps:,}",
                summary.wall_s,
                step_us,
                summary.duration_s,
                peak_gib,
            )
        ],
    )
    targets = [Target(f"{flags.requests:,} requests", summary.wall_s, "<=", _LIMIT_S, "s")]
    is_met = report.print_targets(targets)
    results = {
        "trace": trace.name,
        "step_us": step_us,
        "peak_memory_gib": peak_gib,
        "profile": [
            dict(zip(("function", "calls", "own_s", "all_s"), r, strict=True)) for r in rows
        ],
        "summary": asdict(summary),
    }
    report.write("simulate_speed", results, targets)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

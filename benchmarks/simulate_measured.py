"""Does the simulator foretell what was measured? `python -m benchmarks.simulate_measured`.

    ... --plan-log LOG --session gpu_session.json ... --trace azure_conv_2023.csv [--stage llama-8b]

Prices are fitted to the steps of the plan log, pools and limits are those that it names, and the
loads of the session are simulated with the service's own scheduler. What a launch takes when the
device waits for it is read off the log, too: the time of lone steps outside the device. What the
simulator leaves out, the way between client and scheduler, is taken from L(1), where nothing else
happens, and added to each time to the first token. Of a load in several sessions each figure's
median counts. Targets: throughput of W1, and the p50 and p99 latencies of
the loads that arrive over time, within 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks import report
from benchmarks.report import Target
from benchmarks.step_log import fit, read_steps, round_trip_ns
from blockyard.bench.workload import WorkloadSpec, make_workload
from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.simulate.device import DeviceProfile
from blockyard.simulate.policies import make_policy
from blockyard.simulate.run import simulate
from blockyard.simulate.setup import Setup
from blockyard.simulate.summary import Summary, summarise
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log_reader import PlanLogError, PlanLogReader
from scheduler_svc.policy import PreemptionMode

MAX_ERROR: Final = 0.10
_PRICES: Final = ("step_ns", "token_ns", "free_tokens", "kv_bytes_per_s", "pair_ns")

Json = dict[str, Any]


def setup_of(path: Path) -> Setup:
    """The device and the limits of a plan log's last epoch. Raises PlanLogError and OSError."""
    info, steps = read_steps([path])
    cost, _ = fit(info, steps)
    begins = [event for event in PlanLogReader([path]) if isinstance(event, log_pb.EpochBegin)]
    logged = begins[-1].limits
    fields = {name: getattr(logged, name) for name in logged.DESCRIPTOR.fields_by_name}
    limits = Limits(**fields)
    profile = DeviceProfile(
        info.device,
        CostModel.of(cost),
        info.block_bytes // info.block_size,
        round_trip_ns(PlanLogReader([path])),
    )
    policy = make_policy("blockyard", limits.max_total_tokens - 1, PreemptionMode.AUTO)
    return Setup(limits, policy, profile)


def foretell(record: Json, setup: Setup, trace_path: Path) -> Summary:
    """Simulate the load of a session's record."""
    is_traced = bool(record["spec"]["trace_path"])
    spec = WorkloadSpec(**(record["spec"] | {"trace_path": trace_path if is_traced else None}))
    return summarise(simulate(make_workload(spec).trace, setup))


def loads_of(paths: Sequence[Path], stage: str) -> dict[str, list[Json]]:
    """Records of a stage's loads in which nothing failed, by name. Raises OSError, ValueError."""
    found: dict[str, list[Json]] = {}
    for path in paths:
        for record in json.loads(path.read_text(encoding="utf-8"))["results"]["records"]:
            if record["stage"] == stage and "load" in record and "error" not in record:
                found.setdefault(record["name"], []).append(record)
    for name, records in found.items():
        if any(record["spec"] != records[0]["spec"] for record in records):
            raise ValueError(f"the sessions mean different loads by {name}")
    return found


def way_ms(loads: dict[str, list[Json]], setup: Setup, trace_path: Path) -> float:
    """Time of a lone request outside what is simulated, from L(1); 0 if not measured [ms]."""
    if "L(1)" not in loads:
        return 0.0
    foretold = foretell(loads["L(1)"][0], setup, trace_path).ttft_ms.p50
    measured = median(float(record["load"]["ttft_ms"]["p50"]) for record in loads["L(1)"])
    return max(0.0, measured - foretold)


def rows_of(
    records: Sequence[Json], foretold: Summary, outside_ms: float
) -> Iterator[tuple[str, float, float]]:
    """What is compared of a load: name, measured, foretold."""
    loads = [record["load"] for record in records]
    yield "requests/s", median(load["requests_per_s"] for load in loads), foretold.requests_per_s
    for what in ("ttft", "tpot"):
        percentiles = getattr(foretold, f"{what}_ms")
        for part in ("p50", "p99"):
            measured = median(load[f"{what}_ms"][part] for load in loads)
            added_ms = outside_ms if what == "ttft" else 0.0
            yield f"{what.upper()} {part}, ms", measured, getattr(percentiles, part) + added_ms


def main() -> int:
    """Compare, print, write results/simulate_measured.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate_measured", description=__doc__
    )
    parser.add_argument("--plan-log", type=Path, required=True)
    parser.add_argument("--session", type=Path, required=True, nargs="+")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--stage", default="llama-8b")
    flags = parser.parse_args()
    try:
        setup = setup_of(flags.plan_log)
        loads = loads_of(flags.session, flags.stage)
    except (PlanLogError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    outside_ms = way_ms(loads, setup, flags.trace)
    found, targets = [], []
    for name, records in loads.items():
        kind = records[0]["spec"]["kind"]
        if kind not in ("W1", "A"):
            continue
        summary = foretell(records[0], setup, flags.trace)
        for what, measured, foretold in rows_of(records, summary, outside_ms):
            off = foretold / measured - 1
            found.append((name, what, measured, foretold, off))
            if (kind == "W1") == (what == "requests/s"):
                targets.append(Target(f"{name} {what}, error", abs(off), "<=", MAX_ERROR))
    headers = ("load", "what", "measured", "foretold", "error")
    report.print_table(f"Simulated on {setup.profile.name}", headers, found)
    round_trip_ms = setup.profile.round_trip_ns / 1e6
    print(f"\noutside the device: {round_trip_ms:.1f} ms of a step that nothing hides,")
    print(f"{outside_ms:.1f} ms between client and scheduler")
    are_met = report.print_targets(targets)
    cost = setup.profile.cost
    results = {
        "device": setup.profile.name,
        "prices": {name: getattr(cost, name) for name in _PRICES},
        "round_trip_ms": round_trip_ms,
        "outside_ms": outside_ms,
        "rows": [dict(zip(headers, row, strict=True)) for row in found],
    }
    report.write("simulate_measured", results, targets)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does the simulator foretell what was measured? `python -m benchmarks.simulate_measured`.

    ... --plan-log LOG --session gpu_session.json --trace azure_conv_2023.csv [--stage llama-8b]

Prices are fitted to the steps of the plan log, pools and limits are those that it names, and the
loads of the session are simulated with the service's own scheduler. What the simulator leaves out,
the way from the client to the device and back, is taken from L(1), where nothing else happens, and
added to each time to the first token. Targets: throughput of W1, and the p50 and p99 latencies of
the loads that arrive over time, within 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import report
from benchmarks.report import Target
from benchmarks.step_log import fit, read_steps
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
        CostModel(
            cost.step_ns,
            cost.token_ns,
            cost.kv_bytes_per_s,
            cost.swap_bytes_per_s,
            cost.free_tokens,
            cost.pair_ns,
        ),
        info.block_bytes // info.block_size,
    )
    policy = make_policy("blockyard", limits.max_total_tokens - 1, PreemptionMode.AUTO)
    return Setup(limits, policy, profile)


def foretell(record: Json, setup: Setup, trace_path: Path) -> Summary:
    """Simulate the load of a session's record."""
    is_traced = bool(record["spec"]["trace_path"])
    spec = WorkloadSpec(**(record["spec"] | {"trace_path": trace_path if is_traced else None}))
    return summarise(simulate(make_workload(spec).trace, setup))


def way_ms(records: Sequence[Json], setup: Setup, trace_path: Path) -> float:
    """Time of a lone request outside the device, from L(1); 0 if that was not measured [ms]."""
    for record in records:
        if record["name"] == "L(1)":
            foretold = foretell(record, setup, trace_path).ttft_ms.p50
            return max(0.0, float(record["load"]["ttft_ms"]["p50"]) - foretold)
    return 0.0


def rows_of(
    record: Json, foretold: Summary, outside_ms: float
) -> Iterator[tuple[str, float, float]]:
    """What is compared: name, measured, foretold."""
    load = record["load"]
    yield "requests/s", load["requests_per_s"], foretold.requests_per_s
    for what in ("ttft", "tpot"):
        percentiles = getattr(foretold, f"{what}_ms")
        for part in ("p50", "p99"):
            measured = load[f"{what}_ms"][part]
            added_ms = outside_ms if what == "ttft" else 0.0
            yield f"{what.upper()} {part}, ms", measured, getattr(percentiles, part) + added_ms


def main() -> int:
    """Compare, print, write results/simulate_measured.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate_measured", description=__doc__
    )
    parser.add_argument("--plan-log", type=Path, required=True)
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--stage", default="llama-8b")
    flags = parser.parse_args()
    try:
        setup = setup_of(flags.plan_log)
    except (PlanLogError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    session = json.loads(flags.session.read_text(encoding="utf-8"))["results"]["records"]
    loads = [
        record
        for record in session
        if record["stage"] == flags.stage and "load" in record and "error" not in record
    ]
    outside_ms = way_ms(loads, setup, flags.trace)
    found, targets = [], []
    for record in loads:
        if record["spec"]["kind"] not in ("W1", "A"):
            continue
        summary = foretell(record, setup, flags.trace)
        for what, measured, foretold in rows_of(record, summary, outside_ms):
            off = foretold / measured - 1
            found.append((record["name"], what, measured, foretold, off))
            if (record["name"] == "W1") == (what == "requests/s"):
                name = f"{record['name']} {what}, error"
                targets.append(Target(name, abs(off), "<=", MAX_ERROR))
    headers = ("load", "what", "measured", "foretold", "error")
    report.print_table(f"Simulated on {setup.profile.name}", headers, found)
    print(f"\noutside the device, from L(1): {outside_ms:.1f} ms")
    are_met = report.print_targets(targets)
    cost = setup.profile.cost
    results = {
        "device": setup.profile.name,
        "prices": {name: getattr(cost, name) for name in _PRICES},
        "outside_ms": outside_ms,
        "rows": [dict(zip(headers, row, strict=True)) for row in found],
    }
    report.write("simulate_measured", results, targets)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a plan log says of the steps: `python -m benchmarks.step_log LOG ... [--profile OUT.json]`.

A server started with --plan-log records every plan and its result with the executor's timings.
Prints where the time went for each kind of step, and the prices that fit all of them; --profile
writes these as a device profile, which `blockyard simulate --cost-model` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.report import print_table
from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.cost_model import fit_steps, predict_ns, step_features
from executor_svc.plan import Plan, decode
from executor_svc.row_state import RowState
from executor_svc.runner import RunnerInfo, StepBatch
from scheduler_svc.plan_log_reader import PlanLogError, PlanLogReader

_NS_PER_MS: Final = 1e6
_KINDS: Final = ("decode", "mixed", "prefill")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One step that ran."""

    plan: Plan
    batch: StepBatch
    timings: pb.StepTimings

    @property
    def kind(self) -> str:
        """decode, prefill, or both in one: mixed."""
        num_decode_rows, num_rows = self.batch.num_decode_rows, self.batch.rows.size
        return _KINDS[0 if num_decode_rows == num_rows else 1 if num_decode_rows else 2]

    @property
    def device_ns(self) -> int:
        """From its first kernel to its last."""
        return int(self.timings.forward_ns + self.timings.sample_ns)


def read_steps(paths: Sequence[Path]) -> tuple[RunnerInfo, list[Step]]:
    """The last epoch's executor, and every step of all epochs that took the device any time.

    Raises PlanLogError and OSError.
    """
    found = [(info, step) for info, step in _walk(PlanLogReader(paths)) if step.device_ns]
    if not found:
        raise PlanLogError(paths[0], 0, "no step has a result")
    return found[-1][0], [step for _, step in found]


def _walk(reader: PlanLogReader) -> Iterator[tuple[RunnerInfo, Step]]:
    state = info = None
    waiting: deque[pb.StepPlan] = deque()
    for event in reader:
        if isinstance(event, log_pb.EpochBegin):
            info = info_of(event)
            state = RowState(info)
            waiting.clear()
        elif isinstance(event, pb.StepPlan):
            waiting.append(event)
        elif isinstance(event, pb.StepResult):
            assert state is not None, "the reader has seen an epoch begin"
            assert info is not None
            plan = decode(waiting.popleft())
            yield info, Step(plan, state.apply(plan), event.timings)


def info_of(event: log_pb.EpochBegin) -> RunnerInfo:
    """The executor of an epoch, as far as the log tells."""
    executor = event.executor
    return RunnerInfo(
        model_digest=executor.model_digest,
        model_name=executor.model_name,
        vocab_size=executor.vocab_size,
        max_model_len=executor.max_model_len,
        block_size=executor.block_size,
        num_device_blocks=executor.num_device_blocks,
        num_host_blocks=executor.num_host_blocks,
        max_rows=executor.max_rows,
        max_num_batched_tokens=executor.max_num_batched_tokens,
        block_bytes=executor.block_bytes,
        device=executor.device,
    )


def by_kind(steps: Sequence[Step]) -> list[Json]:
    """Where the time of each kind of step went; milliseconds are means."""
    found = []
    for kind in _KINDS:
        mine = [step for step in steps if step.kind == kind]
        if not mine:
            continue
        times = {
            name: np.array([getattr(step.timings, f"{name}_ns") for step in mine]) / _NS_PER_MS
            for name in ("forward", "sample", "idle", "apply", "queue")
        }
        busy = float(times["forward"].sum() + times["sample"].sum())
        idle = float(times["idle"].sum())
        found.append(
            {
                "kind": kind,
                "steps": len(mine),
                "rows": float(np.mean([step.batch.rows.size for step in mine])),
                "tokens": float(np.mean([step.batch.token_ids.size for step in mine])),
                **{f"{name}_ms": float(each.mean()) for name, each in times.items()},
                "idle_share": idle / (busy + idle),
            }
        )
    return found


def fit(info: RunnerInfo, steps: Sequence[Step]) -> tuple[pb.CostModel, np.ndarray]:
    """Prices of all steps, and the relative error of each step's time [num_steps].

    Steps of each magnitude of tokens weigh the same in all, else those of few tokens would decide.
    """
    features = np.array([step_features(info, step.plan, step.batch) for step in steps])
    times = np.array([step.device_ns for step in steps], np.float64)
    magnitudes = np.log2(features[:, 1]).astype(int)
    cost = fit_steps(features, times, 1 / np.bincount(magnitudes)[magnitudes])
    return cost, predict_ns(cost, features) / times - 1


def round_trip_ns(events: Iterable[object]) -> float:
    """Time from a plan to its result less the device's, of steps with nothing before them.

    The scheduler plans again as soon as a result is there. The median; 0 without such steps.
    """
    found = []
    called_ns = sent_ns = 0
    num_in_flight = lone_step = 0
    device_ns: int | None = None  # of a lone step, until the plan after its result
    for event in events:
        if isinstance(event, log_pb.PlanCall):
            called_ns = event.now_ns
            if device_ns is not None:
                found.append(called_ns - sent_ns - device_ns)
                device_ns = None
        elif isinstance(event, pb.StepPlan):
            if not num_in_flight:
                sent_ns, lone_step = called_ns, event.step_id
            num_in_flight += 1
        elif isinstance(event, pb.StepResult):
            num_in_flight -= 1
            took_ns = event.timings.forward_ns + event.timings.sample_ns
            if event.step_id == lone_step and took_ns:
                device_ns = took_ns
        elif isinstance(event, log_pb.EpochBegin):
            num_in_flight = lone_step = 0
            device_ns = None
    return max(0.0, float(np.median(found))) if found else 0.0


def main() -> int:
    """Print, and write the profile if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_log", description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--profile", type=Path, help="write the fitted prices here")
    parser.add_argument("--swap-gb-per-s", type=float, default=0.0, help="for the profile")
    flags = parser.parse_args()
    try:
        info, steps = read_steps(flags.logs)
    except (PlanLogError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    kinds = by_kind(steps)
    print_table(
        f"{len(steps)} steps on {info.device}", tuple(kinds[0]), [tuple(k.values()) for k in kinds]
    )
    cost, errors = fit(info, steps)
    worst, usual = np.quantile(np.abs(errors), [0.95, 0.5])
    print(
        f"\na step {cost.step_ns / _NS_PER_MS:.2f} ms, a token {cost.token_ns / 1e3:.2f} us "
        f"after the first {cost.free_tokens}, "
        f"KV {cost.kv_bytes_per_s / 1e12:.2f} TB/s, a pair {cost.pair_ns:.2f} ns; "
        f"off by {usual:.1%} (median), "
        f"{worst:.1%} (95th percentile)"
    )
    if flags.profile is not None:
        profile = {
            "step_ns": cost.step_ns,
            "token_ns": cost.token_ns,
            "kv_bytes_per_s": cost.kv_bytes_per_s,
            "swap_bytes_per_s": 1e9 * flags.swap_gb_per_s,
            "free_tokens": cost.free_tokens,
            "pair_ns": cost.pair_ns,
            "kv_bytes_per_token": info.block_bytes // info.block_size,
            "round_trip_ns": round_trip_ns(PlanLogReader(flags.logs)),
        }
        flags.profile.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

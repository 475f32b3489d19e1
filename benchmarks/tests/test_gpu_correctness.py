from __future__ import annotations

import collections
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import gpu_modes, plan_evidence
from benchmarks.gpu_correctness import ModeResult
from benchmarks.gpu_modes import GpuMode, Killer, Proof, Served
from benchmarks.gpu_reference import Parting, chosen, judge
from benchmarks.hf_reference import Reference
from benchmarks.plan_evidence import Evidence
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log import PlanLog
from scheduler_svc.policy import Policy, PreemptionMode

REFERENCE = Reference("p", prompt_ids=[1, 2], output_ids=[0, 1, 2, 3])
LIMITS = Limits(
    num_device_blocks=9,
    block_size=4,
    max_num_seqs=2,
    max_num_batched_tokens=16,
    max_model_len=24,
    vocab_size=100,
    watermark_blocks=1,
    num_host_blocks=3,
    block_bytes=32,
)


def logits(best: list[int], second: list[int], gap: float) -> torch.Tensor:
    """[n, 5]: the likeliest token of each position, and another that is `gap` below."""
    found = torch.zeros(len(best), 5)
    for position, (first, next_best) in enumerate(zip(best, second, strict=True)):
        found[position, first], found[position, next_best] = 9.0, 9.0 - gap
    return found


@pytest.mark.parametrize(("gap", "is_near_tie"), [(0.19, True), (0.21, False), (3.0, False)])
def test_a_near_tie_is_what_rounding_may_decide(gap: float, is_near_tie: bool) -> None:
    exact = logits([0, 1, 4, 4], [1, 2, 3, 3], gap)
    rounded = exact.clone()
    rounded[:, 0] += 0.1  # the noise, on a token that has nothing to do with it
    found = judge(REFERENCE, [0, 2, 4, 4], exact, rounded)
    assert (found.position, found.expected_id, found.got_id) == (1, 1, 2)
    assert found.gap == pytest.approx(gap, rel=1e-4)
    assert found.noise == pytest.approx(0.1, rel=1e-4)
    assert found.is_near_tie is is_near_tie
    assert found.num_far_tokens == 0


def test_tokens_after_the_parting_are_judged_too() -> None:
    exact = logits([0, 1, 4, 4], [1, 2, 3, 3], 0.1)
    found = judge(REFERENCE, [0, 2, 3, 1], exact, exact + 0.1)
    assert found.is_near_tie
    assert found.num_far_tokens == 1  # the last one; the one before it is a near tie


def test_the_token_after_each() -> None:
    values = torch.arange(15).reshape(3, 5)
    assert chosen(values, [4, 0, 2]).tolist() == [0, 7]
    assert chosen(values, [4, 0, 2, 1]).tolist() == [0, 7, 11]


def served(evidence: Evidence, **counts: int) -> Served:
    return Served(
        [], evidence, **({"num_preemptions": 0, "num_kills": 0, "num_restarts": 0} | counts)
    )


def result(*proofs: Proof) -> ModeResult:
    return ModeResult(GpuMode("m", ServeSettings(), proofs))


def missed(found: ModeResult) -> list[str]:
    return [target.name for target in found.targets() if not target.is_met]


def test_a_mode_must_show_what_it_is_for() -> None:
    found = result(Proof("max_rows", "<=", 1), Proof("num_restarts", ">=", 2))
    found.served = served(Evidence(max_rows=2), num_restarts=1)
    assert missed(found) == ["m: max rows", "m: restarts"]
    found.served = served(Evidence(max_rows=1), num_restarts=2)
    assert not missed(found)


def test_what_is_no_near_tie_fails_and_so_does_a_failed_mode() -> None:
    found = result()
    assert missed(found) == ["m: outputs"]
    assert "error" in found.document()
    found.served = served(Evidence())
    near = Parting("p", 0, 1, 2, gap=0.1, noise=0.1, num_far_tokens=0)
    other = Parting("p", 0, 1, 2, gap=0.3, noise=0.1, num_far_tokens=3)
    found.partings = [near]
    assert not missed(found)
    found.partings = [near, other]
    assert missed(found) == ["m: other partings", "m: far tokens after"]
    assert (found.num_near_ties, found.num_others, found.num_far_tokens) == (1, 1, 3)


class FakeServer:
    def __init__(self, pid: int) -> None:
        self.pids = {"executor": pid}


def test_the_killer_strikes_each_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: kills.append((pid, number)))
    server = FakeServer(5)
    killer = Killer(cast("LocalServer", server), collections.deque([3, 2]))
    killer.on_tokens(2)
    assert not kills
    for _ in range(4):
        killer.on_tokens(1)
    assert kills == [(5, signal.SIGKILL)]
    server.pids = {}
    killer.on_tokens(9)
    server.pids = {"executor": 6}
    killer.on_tokens(1)
    assert kills == [(5, signal.SIGKILL), (6, signal.SIGKILL)]
    server.pids = {"executor": 7}
    killer.note_pid()
    assert (killer.killed, len(killer.pids)) == ([5, 6], 3)


def test_evidence_of_a_plan_log(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "log", Policy(PreemptionMode.SWAP, is_caching=True))

    def plan(**parts: Any) -> None:
        log.plan(pb.StepPlan(**parts))

    log.begin_epoch(1, pb.DescribeResponse(), LIMITS)
    plan(batch=pb.Batch(rows=[0, 1], num_scheduled_tokens=[1, 7], num_decode_rows=1))
    plan(batch=pb.Batch(same=True), swap_out=pb.BlockPairs(src=[1, 2], dst=[0, 1]))
    log.result(pb.StepResult())
    plan(swap_in=pb.BlockPairs(src=[1], dst=[3]))
    log.begin_epoch(2, pb.DescribeResponse(), LIMITS)
    plan(batch=pb.Batch(rows=[0, 1, 2]))
    log.close()
    assert plan_evidence.read(tmp_path / "log") == Evidence(
        num_epochs=2,
        num_steps=3,
        max_rows=3,
        max_tokens=8,
        max_plans_in_flight=2,
        num_swapped_out=2,
        num_swapped_in=1,
    )


def test_all_modes_have_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_modes, "small_pool_size", lambda *_arguments: "1MiB")

    class Model:
        path = Path("/m")

    modes = gpu_modes.gpu_modes(cast("Any", Model), "cuda", [10] * 64)
    assert len({mode.name for mode in modes}) == 7
    counts = set(Served.__dataclass_fields__) | set(Evidence.__dataclass_fields__)
    for mode in modes:
        assert mode.proofs
        assert {proof.count for proof in mode.proofs} <= counts
        assert mode.settings.device == "cuda"

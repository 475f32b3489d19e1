from __future__ import annotations

from typing import Any

import pytest

from scheduler_svc.beam import BeamParams
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.policy import (
    PreemptionMode,
    needs_reservation,
    pick_victim,
    should_swap,
)
from scheduler_svc.request import Branch, RequestStatus
from scheduler_svc.tests.driver import make_request
from scheduler_svc.waiting_queue import WaitingQueue


def make(key: int, num_preemptions: int = 0, **fields: Any) -> Branch:
    """The first branch of a request."""
    branch = make_request(key, **fields).branches[0]
    branch.num_preemptions = num_preemptions
    return branch


# ---- victims


def test_victim_is_the_youngest_and_never_older() -> None:
    branches = [make(key) for key in (3, 7, 5)]
    assert pick_victim(branches, make(4)) is branches[1]
    assert pick_victim(branches, make(8)) is None
    assert pick_victim(branches, branches[1]) is None
    assert pick_victim([], make(1)) is None


def test_reserved_branches_are_victims_last() -> None:
    reserved, other = make(9, num_preemptions=2), make(6)
    assert needs_reservation(reserved)
    assert not needs_reservation(make(9, num_preemptions=1))
    assert pick_victim([reserved, other], make(1)) is other
    assert pick_victim([reserved], make(1)) is reserved


def test_samples_take_from_each_other_and_lanes_do_not() -> None:
    samples = make_request(1, num_samples=3).branches
    assert pick_victim(samples, samples[0]) is samples[2]
    lanes = make_request(2, beam=BeamParams(3)).branches
    assert pick_victim(lanes, lanes[0]) is None
    assert pick_victim([*lanes, *samples], samples[1]) is lanes[2]


# ---- prices

LIMITS = Limits(
    num_device_blocks=9,
    block_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=64,
    vocab_size=256,
    block_bytes=1000,
)


@pytest.mark.parametrize(
    ("swap_bytes_per_s", "expected"), [(0.0, False), (1e9, False), (1.25e9, False), (1.26e9, True)]
)
def test_the_cheaper_way_is_taken_and_an_unknown_price_is_none(
    swap_bytes_per_s: float, expected: bool
) -> None:
    """Sixteen tokens cost 1600 ns to compute; 1000 bytes move out and in again."""
    cost = CostModel(token_ns=100.0, swap_bytes_per_s=swap_bytes_per_s)
    for num_blocks in (1, 7):
        assert should_swap(PreemptionMode.AUTO, cost, LIMITS, num_blocks, 0) is expected


def test_a_long_context_makes_recomputing_dear() -> None:
    """1.25 GB/s is just too slow for 16 tokens, unless these read much KV."""
    cost = CostModel(token_ns=100.0, kv_bytes_per_s=1e12, swap_bytes_per_s=1.24e9)
    assert not should_swap(PreemptionMode.AUTO, cost, LIMITS, 1, 0)
    assert should_swap(PreemptionMode.AUTO, cost, LIMITS, 1, 1_000_000)


def test_many_pairs_make_recomputing_dear() -> None:
    """The same for a device whose attention is bound by computing."""
    cost = CostModel(token_ns=100.0, pair_ns=0.01, swap_bytes_per_s=1.2e9)
    assert not should_swap(PreemptionMode.AUTO, cost, LIMITS, 1, 0)
    assert should_swap(PreemptionMode.AUTO, cost, LIMITS, 1, 1_000)


def test_a_prompt_costs_its_tokens_and_their_pairs() -> None:
    """The first attends to itself, the third to three."""
    assert CostModel(5.0, 2.0, pair_ns=1.0).prefill_time_ns(3) == pytest.approx(11.0 + 6.0)


@pytest.mark.parametrize("swap_bytes_per_s", [0.0, 1e12])
def test_a_fixed_mode_asks_no_price(swap_bytes_per_s: float) -> None:
    cost = CostModel(token_ns=100.0, swap_bytes_per_s=swap_bytes_per_s)
    assert should_swap(PreemptionMode.SWAP, cost, LIMITS, 1, 0)
    assert not should_swap(PreemptionMode.RECOMPUTE, cost, LIMITS, 1, 0)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (CostModel(), 0.0),
        (CostModel(step_ns=5.0, token_ns=2.0), 25.0),
        (CostModel(5.0, 2.0, kv_bytes_per_s=1e9), 25.0 + 300.0),
        (CostModel(5.0, 2.0, 1e9, swap_bytes_per_s=1e8), 25.0 + 300.0 + 400.0),
        (CostModel(5.0, 2.0, pair_ns=0.5), 25.0 + 60.0),
    ],
)
def test_a_step_costs_the_sum_of_what_is_known(cost: CostModel, expected: float) -> None:
    assert cost.step_time_ns(10, 300.0, 40.0, num_pairs=120) == pytest.approx(expected)


# ---- the queue


def test_queue_returns_preempted_branches_to_their_place() -> None:
    queue = WaitingQueue()
    for key in (4, 5, 2):
        queue.push(make(key))
    assert [queue.pop().request.key for _ in range(3)] == [2, 4, 5]
    assert queue.peek() is None


def test_queue_skips_branches_that_ended() -> None:
    queue = WaitingQueue()
    first, second = make(1), make(2)
    queue.push(first)
    queue.push(second)
    first.move_to(RequestStatus.FINISHED_ABORTED)
    queue.discard(first)
    assert len(queue) == 1
    assert list(queue) == [second]
    assert queue.pop() is second
    assert not second.is_queued
    assert queue.peek() is None


def test_only_what_ended_is_discarded() -> None:
    queue = WaitingQueue()
    branch = make(1)
    queue.push(branch)
    with pytest.raises(AssertionError):
        queue.discard(branch)

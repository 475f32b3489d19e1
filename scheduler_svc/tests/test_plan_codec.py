from __future__ import annotations

import numpy as np
import pytest

from blockyard.common.columns import unpack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc import plan_codec
from scheduler_svc.beam import BeamParams
from scheduler_svc.request import Branch, Sampling
from scheduler_svc.step_plan import Moves, NewRow, StepPlan
from scheduler_svc.tests.driver import make_request


def new_row(row: int, branch: Branch, num_computed: int = 0, **fields: int) -> NewRow:
    """A row with the branch's tokens from `num_computed` on, and two blocks named after it."""
    block_ids = np.array([10 * row, 10 * row + 1], np.int32)
    return NewRow(row, branch, num_computed, branch.token_ids[num_computed:], block_ids, **fields)


def encoded(*new_rows: NewRow) -> pb.NewRows:
    """The message's part for rows that begin."""
    return plan_codec.encode(StepPlan(1, 1, new_rows=list(new_rows))).new_rows


def test_steady_decode_is_a_few_bytes() -> None:
    plan = StepPlan(7, 3, rows=np.arange(256), num_decode_rows=256, same_batch=True)
    assert len(plan_codec.encode(plan).SerializeToString()) <= 16


def test_decode_rows_come_first_with_one_token_each() -> None:
    plan = StepPlan(1, 1, rows=np.array([4, 9, 2]), num_decode_rows=2, num_scheduled_tokens=[5])
    batch = plan_codec.encode(plan).batch
    assert (list(batch.rows), batch.num_decode_rows) == ([4, 9, 2], 2)
    assert list(batch.num_scheduled_tokens) == [1, 1, 5]
    plan = StepPlan(1, 1, rows=np.array([4, 9]), num_decode_rows=2)
    assert not plan_codec.encode(plan).batch.num_scheduled_tokens


# ---- rows that begin


def test_new_rows_become_parallel_columns() -> None:
    first = make_request(3, range(3), sampling=Sampling(seed=2**63 + 3))
    second = make_request(5, range(5), sampling=Sampling(0.5, 7, 0.25, 0.125, 2**63 + 5))
    new = encoded(new_row(4, first.branches[0]), new_row(9, second.branches[0]))
    assert list(new.rows) == [4, 9]
    assert list(new.request_keys) == [3, 5]
    assert list(new.num_tokens) == list(new.num_prompt_tokens) == [3, 5]
    assert unpack_u32(new.token_ids).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert list(new.block_counts) == [2, 2]
    assert unpack_u32(new.block_ids).tolist() == [40, 41, 90, 91]
    assert [list(c) for c in (new.temperature, new.top_k, new.top_p, new.min_p)] == [
        [0.0, 0.5],
        [0, 7],
        [1.0, 0.25],
        [0.0, 0.125],
    ]
    assert list(new.seeds) == [2**63 + 3, 2**63 + 5]


def test_columns_of_zeros_are_left_out() -> None:
    new = encoded(new_row(4, make_request(1).branches[0]))
    optional = (new.num_computed_tokens, new.branches, new.temperature, new.flags)
    assert not any([*optional, new.num_candidates, new.logits_from])


def test_a_row_with_a_cached_prefix_sends_what_comes_after_it() -> None:
    branch = make_request(1, range(12)).branches[0]
    branch.token_ids = np.append(branch.token_ids, np.int32(77))  # of an earlier residence
    new = encoded(new_row(4, branch, num_computed=8), new_row(5, make_request(2).branches[0]))
    assert list(new.num_computed_tokens) == [8, 0]
    assert list(new.num_tokens) == [13, 1]
    assert list(new.num_prompt_tokens) == [12, 1]
    assert unpack_u32(new.token_ids).tolist() == [8, 9, 10, 11, 77, 1]


def test_samples_say_whose_logits_they_take() -> None:
    leader, sample = make_request(1, range(5), num_samples=2).branches
    new = encoded(new_row(0, leader), new_row(3, sample, num_computed=5, logits_from=0))
    assert list(new.branches) == [0, 1]
    assert list(new.logits_from) == [0, 1]  # row + 1
    assert list(new.num_tokens) == [5, 5]
    assert list(new.num_computed_tokens) == [0, 5]
    assert len(unpack_u32(new.token_ids)) == 5  # the leader's alone


def test_lanes_are_driven_and_ask_for_candidates() -> None:
    lane = make_request(1, beam=BeamParams(2)).branches[1]
    new = encoded(new_row(0, make_request(2).branches[0]), new_row(1, lane, num_candidates=3))
    assert list(new.flags) == [0, pb.ROW_FLAG_DRIVEN]
    assert list(new.num_candidates) == [0, 3]
    assert list(new.branches) == [0, 1]


# ---- what changes


def test_moves_are_pairs_from_source_to_destination() -> None:
    moves = Moves(swap_out=[(1, 2), (3, 4)], copy=[(5, 6)], swap_in=[(7, 8)])
    message = plan_codec.encode(StepPlan(1, 1, moves=moves))
    assert (list(message.swap_out.src), list(message.swap_out.dst)) == ([1, 3], [2, 4])
    assert (list(message.copy.src), list(message.copy.dst)) == ([5], [6])
    assert (list(message.swap_in.src), list(message.swap_in.dst)) == ([7], [8])
    assert not plan_codec.encode(StepPlan(1, 1)).HasField("swap_out")


def test_forks_and_inputs() -> None:
    plan = StepPlan(1, 1, forks=[(0, 1, 30), (2, 3, 0)], inputs=[(0, 50), (1, 51)])
    message = plan_codec.encode(plan)
    assert list(message.forks.src_rows) == [0, 2]
    assert list(message.forks.dst_rows) == [1, 3]
    assert list(message.forks.tail_dst_block_ids) == [30, 0]
    assert (list(message.inputs.rows), list(message.inputs.token_ids)) == ([0, 1], [50, 51])


@pytest.mark.parametrize(("counts", "expected"), [([1, 1], []), ([1, 2], [1, 2])])
def test_appends_of_one_block_each_need_no_counts(counts: list[int], expected: list[int]) -> None:
    block_ids = [np.arange(count, dtype=np.int32) + 7 for count in counts]
    plan = StepPlan(
        1, 1, append_rows=[3, 4], append_counts=counts, append_block_ids=block_ids, freed_rows=[8]
    )
    message = plan_codec.encode(plan)
    assert list(message.appends.rows) == [3, 4]
    assert list(message.appends.counts) == expected
    assert list(message.appends.block_ids) == [7, *block_ids[1].tolist()]
    assert list(message.freed_rows) == [8]


# ---- results


def test_decode_keeps_order_and_failures() -> None:
    result = plan_codec.decode(
        pb.StepResult(epoch=1, step_id=2, token_ids=[5, 4, 9], failed_rows=[3], failed_status=[1])
    )
    assert (result.epoch, result.step_id) == (1, 2)
    assert result.token_ids.tolist() == [5, 4, 9]
    assert result.failed_rows == {3}
    assert not len(result.candidate_token_ids)


def test_decode_brings_candidates() -> None:
    result = plan_codec.decode(
        pb.StepResult(
            epoch=1,
            step_id=2,
            token_ids=[5],
            candidate_token_ids=[7, 8],
            candidate_logprobs=[-0.5, -1.5],
            token_logprobs=[-2.5],
        )
    )
    assert result.candidate_token_ids.tolist() == [7, 8]
    assert result.candidate_logprobs.tolist() == [-0.5, -1.5]
    assert result.token_logprobs.tolist() == [-2.5]
    assert result.candidate_logprobs.dtype == np.float32

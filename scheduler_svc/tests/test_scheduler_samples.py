"""Scenarios of requests with several samples: one prefill, shared blocks, the parting."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler_svc.policy import Policy
from scheduler_svc.request import MAX_BRANCHES, Request, RequestStatus, Sampling
from scheduler_svc.step_plan import StepPlan
from scheduler_svc.tests.driver import EOS, PLAN_NS, Driver, new_row_of, num_preemptions, output_ids


def tables(plan: StepPlan) -> list[list[int]]:
    """The block table of each row that begins, in order of branches."""
    by_branch = sorted(plan.new_rows, key=lambda new: new.branch.index)
    return [new.block_ids.tolist() for new in by_branch]


def num_borrowed(plans: list[StepPlan]) -> int:
    """Rows that began with another one's logits."""
    return sum(new.logits_from is not None for plan in plans for new in plan.new_rows)


def queued(driver: Driver) -> list[int]:
    """Indexes of the branches in line."""
    return sorted(branch.index for branch in driver.scheduler.waiting)


@pytest.mark.parametrize("count", [0, MAX_BRANCHES + 1])
def test_a_request_has_at_least_one_branch_and_not_too_many(count: int) -> None:
    with pytest.raises(AssertionError):
        Driver().submit(4, num_samples=count)


# ---- beginning together


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 8, 10])
def test_one_prefill_serves_all_samples(num_prompt_tokens: int) -> None:
    driver = Driver()
    request = driver.submit(num_prompt_tokens, num_samples=3)
    plan = driver.plan()
    leader, *others = request.branches
    assert plan.rows.tolist() == [leader.row]
    assert list(plan.num_scheduled_tokens) == [num_prompt_tokens]
    assert plan.sampling_rows.tolist() == [branch.row for branch in request.branches]
    assert new_row_of(plan, leader).logits_from is None
    for branch in others:
        new = new_row_of(plan, branch)
        assert (new.logits_from, new.num_computed_tokens) == (leader.row, num_prompt_tokens)
        assert not len(new.token_ids)
    output = driver.commit([101, 102, 103])
    assert output.branches.tolist() == [0, 1, 2]
    driver.run_dry()
    assert [output_ids(branch)[0] for branch in request.branches] == [101, 102, 103]


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 8, 10])
def test_full_blocks_are_shared_and_the_last_one_is_copied_before_anybody_writes(
    num_prompt_tokens: int,
) -> None:
    driver = Driver()
    request = driver.submit(num_prompt_tokens, num_samples=3)
    first = driver.plan()
    assert not first.moves
    num_full, has_tail = num_prompt_tokens // 4, num_prompt_tokens % 4 > 0
    leader, *others = tables(first)
    assert all(table[:num_full] == leader[:num_full] for table in others)
    assert all(len(table) == num_full + has_tail for table in others)
    second = driver.plan()  # the first one may still be under way
    assert second.rows.tolist() == first.sampling_rows.tolist()
    tails = [(leader[num_full], table[num_full]) for table in others if has_tail]
    assert sorted(second.moves.copy) == sorted(tails)
    assert len(second.append_rows) == (0 if has_tail else 3)
    own = [driver.scheduler.kv.table(branch.row)[num_full] for branch in request.branches]
    assert len(set(own)) == 3
    assert not driver.plan().moves
    driver.commit()
    driver.run_dry()
    assert request.blocks.num_shared == 2 * num_full
    assert request.blocks.num_copied == 2 * has_tail
    assert driver.scheduler.snapshot().counters.num_copied == 2 * has_tail


def test_what_samples_share_is_counted_once() -> None:
    driver = Driver()
    driver.submit(10, num_samples=4)
    driver.plan()
    device = driver.scheduler.snapshot().device
    assert device.num_saved_by_sharing == 3 * 8
    # The leader's ten tokens are under way; each of the other tails counts as stored.
    assert (device.num_in_flight, device.num_stored) == (10, 3 * 2)


def test_samples_of_a_chunked_prompt_begin_with_its_last_chunk() -> None:
    driver = Driver()
    driver.submit(20, num_samples=2)
    assert len(driver.step().new_rows) == 1
    (new,) = driver.step().new_rows
    assert (new.branch.index, new.logits_from) == (1, 0)


def test_samples_of_a_cached_prompt_share_the_cached_blocks() -> None:
    driver = Driver()
    prompt = list(range(10, 20))
    driver.run(prompt)
    request = driver.submit(prompt, num_samples=2)
    plan = driver.plan()
    assert list(plan.num_scheduled_tokens) == [2]
    assert tables(plan)[0][:2] == tables(plan)[1][:2]
    driver.run_dry()
    assert request.num_cached_tokens == 8
    assert request.blocks.num_shared == 4


def test_every_sample_asks_for_log_probabilities() -> None:
    driver = Driver()
    request = driver.submit(4, num_samples=2, sampling=Sampling(num_logprobs=3))
    plan = driver.plan()
    assert [new.num_candidates for new in plan.new_rows] == [2, 2]
    output = driver.commit(5, scores=[{7: -1.0, 8: -2.0}, {9: -3.0, 6: -4.0}])
    assert [output.logprobs[i].logprob for i in (0, 1)] == [-0.5, -0.5]
    assert [output.logprobs[i].candidate_token_ids.tolist() for i in (0, 1)] == [[7, 8], [9, 6]]
    assert np.array_equal(output.logprobs[1].candidate_logprobs, [-3.0, -4.0])
    driver.scheduler.abort(request)


# ---- not all at once


def test_samples_without_a_row_queue_and_find_the_prompt_cached() -> None:
    driver = Driver(max_num_seqs=2)
    request = driver.submit(10, max_tokens=3, num_samples=4)
    assert len(driver.plan().new_rows) == 2
    assert queued(driver) == [2, 3]
    driver.commit()
    before = driver.scheduler.snapshot().counters.num_hit_tokens_device
    plans = driver.run_dry()
    late = [new for plan in plans for new in plan.new_rows]
    assert [new.branch.index for new in late] == [2, 3]
    assert all(new.logits_from is None and new.num_computed_tokens == 8 for new in late)
    assert driver.scheduler.snapshot().counters.num_hit_tokens_device - before == 16
    assert [len(output_ids(branch)) for branch in request.branches] == [3, 3, 3, 3]


@pytest.mark.parametrize(("num_blocks", "watermark", "expected"), [(4, 0, 1), (5, 1, 1), (5, 0, 2)])
def test_samples_without_blocks_queue(num_blocks: int, watermark: int, expected: int) -> None:
    driver = Driver(num_device_blocks=1 + num_blocks, watermark_blocks=watermark, max_num_seqs=3)
    request = driver.submit(10, max_tokens=2, num_samples=3)
    assert num_borrowed([driver.plan()]) == expected
    driver.commit()
    driver.run_dry()
    assert request.is_finished


def test_samples_wait_their_turn_before_later_requests() -> None:
    driver = Driver(max_num_seqs=2)
    request = driver.submit(4, max_tokens=1, num_samples=3)
    later = driver.submit(4, max_tokens=1)
    driver.step()
    plan = driver.step()
    assert [new.branch for new in plan.new_rows] == [request.branches[2], later.branches[0]]


def test_a_sample_may_need_a_whole_reservation() -> None:
    driver = Driver(Policy(reserve_tokens=lambda request: 16), num_device_blocks=12)
    driver.submit(6, num_samples=4)
    plan = driver.plan()
    # Four blocks, and three more for each that shares one; eleven there are.
    assert [len(table) for table in tables(plan)] == [4, 4, 4]
    driver.commit()
    driver.run_dry()


def test_only_the_last_sample_ends_the_request() -> None:
    driver = Driver()
    request = driver.submit(4, num_samples=3)
    driver.plan()
    assert [f.is_last for f in driver.commit([9, EOS, 9]).finished] == [False]
    driver.plan()
    assert [f.is_last for f in driver.commit([9, 9]).finished] == []
    driver.plan()
    finished = driver.commit([EOS, EOS]).finished
    assert [(f.branch, f.is_last) for f in finished] == [(0, False), (2, True)]
    assert driver.scheduler.snapshot().counters.num_finished == 1
    assert request.is_finished


def test_a_stop_string_ends_one_sample() -> None:
    driver = Driver()
    request = driver.submit(4, max_tokens=5, num_samples=2)
    driver.step()
    driver.step()
    finished = driver.scheduler.stop(request.branches[1], 1)
    assert (finished.branch, finished.is_last, finished.num_output_tokens) == (1, False, 1)
    driver.run_dry()
    assert len(output_ids(request.branches[0])) == 5


# ---- ends between the parting and the copy


def test_a_leader_that_stops_at_its_first_token_leaves_its_last_block_to_the_others() -> None:
    driver = Driver()
    request = driver.submit(10, num_samples=3)
    driver.submit(30)  # wants every block it can get
    first = driver.plan()
    tail = tables(first)[0][2]
    driver.commit([EOS, 9, 9])
    second = driver.plan()
    assert second.freed_rows == [0]
    assert {src for src, _ in second.moves.copy} == {tail}
    taken = [i for ids in second.append_block_ids for i in ids.tolist()]
    taken += [i for new in second.new_rows for i in new.block_ids.tolist()]
    assert tail not in taken
    driver.commit()
    driver.run_dry()
    assert [len(output_ids(branch)) for branch in request.branches] == [1, 8, 8]


def test_a_sample_that_stops_at_its_first_token_needs_no_copy() -> None:
    driver = Driver()
    driver.submit(10, num_samples=3)
    first = driver.plan()
    tail = tables(first)
    driver.commit([9, EOS, 9])
    assert driver.plan().moves.copy == [(tail[0][2], tail[2][2])]


def test_samples_of_one_token_need_no_copy_at_all() -> None:
    driver = Driver()
    driver.submit(10, max_tokens=1, num_samples=3)
    driver.step()
    plan = driver.plan()
    assert not plan.moves
    assert sorted(plan.freed_rows) == [0, 1, 2]
    assert driver.scheduler.snapshot().counters.num_copied == 0


def test_abort_between_the_parting_and_the_copy() -> None:
    driver = Driver(max_num_seqs=3)
    request = driver.submit(10, num_samples=4)
    driver.plan()
    driver.scheduler.abort(request)
    plan = driver.plan()
    assert not plan.moves
    assert sorted(plan.freed_rows) == [0, 1, 2]
    assert not driver.scheduler.waiting
    assert not len(driver.commit().token_ids)
    driver.run_dry()


def test_abort_before_the_parting_ends_samples_that_never_queued() -> None:
    driver = Driver()
    request = driver.submit(20, num_samples=3)
    driver.step()
    driver.scheduler.abort(request)
    assert all(b.status is RequestStatus.FINISHED_ABORTED for b in request.branches)
    assert num_borrowed(driver.run_dry()) == 0


def test_one_failed_sample_fails_the_request() -> None:
    driver = Driver(max_num_seqs=2)
    request = driver.submit(4, num_samples=3)
    driver.plan()
    (finished,) = driver.commit(failed_rows=[request.branches[1].row]).finished
    assert (finished.branch, finished.is_last) == (1, True)
    assert all(b.status is RequestStatus.FINISHED_ERROR for b in request.branches)
    driver.run_dry()


# ---- pressure


def _under_pressure(num_prompt_tokens: int, max_tokens: int = 6) -> tuple[Driver, Request]:
    """An old request that will need nearly all nine blocks, and three samples beside it."""
    driver = Driver(num_device_blocks=10, max_model_len=33)
    driver.submit(4, max_tokens=28)
    request = driver.submit(num_prompt_tokens, max_tokens, num_samples=3)
    return driver, request


def test_samples_are_preempted_one_by_one_youngest_first() -> None:
    driver, request = _under_pressure(6)
    order = []
    while not request.is_finished:
        before = [branch.num_preemptions for branch in request.branches]
        driver.step()
        after = [branch.num_preemptions for branch in request.branches]
        order += [i for i in range(3) if after[i] > before[i]]
    driver.run_dry()
    assert order
    assert order[0] == 2
    assert driver.requests[0].branches[0].num_preemptions == 0
    assert [len(output_ids(branch)) for branch in request.branches] == [6, 6, 6]


def test_a_leader_preempted_before_the_parting_parts_later() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=33, max_num_batched_tokens=8)
    driver.submit(15, max_tokens=10)
    driver.step()
    driver.step()
    request = driver.submit(16, max_tokens=3, num_samples=2)
    plans = []
    while not request.branches[0].num_preemptions:
        plans.append(driver.step())
    assert num_borrowed(plans) == 0
    assert queued(driver) == [0]
    assert num_borrowed(driver.run_dry()) == 1
    assert [len(output_ids(branch)) for branch in request.branches] == [3, 3]


def test_a_leader_preempted_after_the_parting_does_not_part_again() -> None:
    driver, request = _under_pressure(9, max_tokens=16)
    plans = driver.run_dry()
    assert all(branch.num_preemptions for branch in request.branches)
    assert num_borrowed(plans) == 2
    assert [len(output_ids(branch)) for branch in request.branches] == [16, 16, 16]


def test_a_token_under_way_reaches_its_own_branch_after_preemption() -> None:
    driver, request = _under_pressure(6)
    driver.plan()
    while not num_preemptions(driver):
        driver.plan()
        if not num_preemptions(driver):
            driver.commit()
    victim = request.branches[2]
    assert victim.status is RequestStatus.WAITING
    num_known = len(victim.token_ids)
    output = driver.commit(77)
    assert victim.token_ids[num_known:].tolist() == [77]
    assert 2 in output.branches.tolist()


# ---- usage


def test_held_blocks_are_counted_for_each_holder() -> None:
    driver = Driver()
    request = driver.submit(8, max_tokens=2, num_samples=2)
    driver.step()  # two blocks each
    driver.step()  # and a third
    driver.run_dry()
    assert request.blocks.held_block_ns == 2 * (2 * PLAN_NS)

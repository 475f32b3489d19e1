"""Scenarios of beam searches under pressure: who gives way, and how a search begins again."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler_svc.policy import Policy
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.tests.driver import (
    PARTING,
    WIDTH_2,
    Driver,
    go_on,
    new_row_of,
    num_preemptions,
    output_ids,
)


def pressed(**fields: Any) -> tuple[Driver, Request, Request]:
    """An old request and a young search, which is one block short at its next step."""
    policy = fields.pop("policy", None)
    driver = Driver(policy, num_device_blocks=8, max_model_len=29)
    older = driver.submit(1, max_tokens=27)
    search = driver.submit(8, max_tokens=8, beam=WIDTH_2, **fields)
    driver.plan()
    driver.commit(scores=PARTING)
    for _ in range(4):
        driver.plan()
        go_on(driver)
    # Held: two blocks by the old request; the prompt's two and one each by the beams.
    assert driver.scheduler.kv.pool.num_free == 1
    return driver, older, search


def test_a_search_that_finds_no_victim_sits_out_and_keeps_others_out() -> None:
    driver, older, search = pressed()
    small = driver.submit(1, max_tokens=1)
    plan = driver.plan()
    assert plan.rows.tolist() == [older.branches[0].row]
    assert not plan.new_rows  # though it has a block that would do
    assert all(b.status is RequestStatus.RUNNING for b in search.branches)
    assert small.branches[0].is_queued


def preempted(**fields: Any) -> tuple[Driver, Request]:
    """A search that has just been preempted for an older request, which is gone now."""
    driver, older, search = pressed(**fields)
    while not num_preemptions(driver):
        driver.step()
    driver.scheduler.abort(older)
    return driver, search


def test_a_search_is_preempted_whole() -> None:
    driver, _, search = pressed()
    while not num_preemptions(driver):
        plan = driver.step()
    assert sorted(plan.freed_rows) == [1, 2]
    assert [b.status for b in search.branches] == [RequestStatus.WAITING] * 2
    assert [b.num_preemptions for b in search.branches] == [1, 1]
    assert list(driver.scheduler.waiting) == [search.branches[0]]
    driver.run_dry()
    assert search.is_finished


@pytest.mark.parametrize(("is_caching", "expected"), [(True, [8, 8]), (False, [8, 12])])
def test_a_search_that_begins_again_shares_as_it_did(is_caching: bool, expected: list[int]) -> None:
    driver, search = preempted(policy=Policy(is_caching=is_caching))
    plan = driver.plan()
    news = [new_row_of(plan, branch) for branch in search.branches]
    assert news[0].block_ids.tolist()[:2] == news[1].block_ids.tolist()[:2]
    # Of the third blocks the old request took one; with its own blocks cached there is no blank
    # one for the first lane, which takes the other.
    assert [new.num_computed_tokens for new in news] == expected
    assert [output_ids(branch) for branch in search.branches] == [
        [50, 60, 60, 60, 60],
        [51, 60, 60, 60, 60],
    ]
    assert not plan.forks
    go_on(driver)
    plan = driver.plan()
    assert plan.inputs == [(news[0].row, 60), (news[1].row, 60)]


def test_lanes_that_begin_again_in_two_plans_go_on_together() -> None:
    driver, search = preempted()
    driver.scheduler.flush_cache()
    driver.submit(1)
    first = driver.plan()
    # The second lane shares the prompt with the first one, and the budget is used up.
    assert list(first.num_scheduled_tokens) == [13, 3]
    second = driver.plan()
    assert second.num_scheduled_tokens[0] == 2
    driver.commit(scores=[{70: -0.1}])
    assert driver.scheduler.has_beams_in_flight
    assert not driver.plan().inputs
    driver.commit(scores=[{71: -0.1}])
    assert [token_id for _, token_id in driver.plan().inputs] == [70, 71]
    assert search.branches[0].status is RequestStatus.RUNNING


def test_an_old_search_takes_blocks_from_a_young_request() -> None:
    driver = Driver(num_device_blocks=8, max_model_len=29)
    search = driver.submit(8, max_tokens=6, beam=WIDTH_2)
    driver.plan()
    driver.commit(scores=PARTING)
    driver.plan()  # the prompt's two blocks and one each
    go_on(driver)
    young = driver.submit(8, max_tokens=6).branches[0]
    plans = []
    while not young.num_preemptions:
        plans.append(driver.plan())
        go_on(driver)
    assert [b.num_preemptions for b in search.branches] == [0, 0]
    assert all(len(plan.inputs) == 2 for plan in plans)
    driver.run_dry()
    assert len(output_ids(young)) == 6


def test_after_two_preemptions_a_search_enters_with_its_worst_case_reserved() -> None:
    driver = Driver(num_device_blocks=10, max_model_len=29)
    driver.submit(9, max_tokens=3)  # three blocks of nine
    search = driver.submit(4, max_tokens=12, beam=WIDTH_2)  # one shared, three each
    for branch in search.branches:
        branch.num_preemptions = 2
    driver.plan()
    assert not any(b.status is RequestStatus.RUNNING for b in search.branches)
    driver.run_dry()
    assert search.is_finished


def test_searches_without_a_cache_share_with_themselves_only() -> None:
    driver = Driver(Policy(is_caching=False))
    prompt = list(range(10, 22))
    assert [driver.run(prompt, beam=WIDTH_2).num_cached_tokens for _ in range(2)] == [0, 0]


def test_lanes_of_one_search_do_not_take_from_each_other() -> None:
    """The largest search that the limits allow runs to its end without giving way."""
    driver = Driver(num_device_blocks=8, max_model_len=29)
    longest = driver.limits.max_beam_tokens(8, 2)
    search = driver.submit(8, max_tokens=longest - 8, beam=WIDTH_2)
    driver.plan()
    driver.commit(scores=PARTING)
    while not search.is_finished:
        driver.plan()
        go_on(driver)
    assert num_preemptions(driver) == 0
    assert longest == 17

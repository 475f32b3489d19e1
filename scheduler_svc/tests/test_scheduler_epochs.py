"""Scenarios of a lost executor: what the next one is told, who is suspected, who must fail."""

from __future__ import annotations

import pytest

from scheduler_svc.beam import BeamParams, EarlyStopping
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import RequestStatus
from scheduler_svc.tests.driver import (
    EOS,
    PARTING,
    SWAP,
    WIDTH_2,
    Driver,
    admitted,
    go_on,
    new_row_of,
    num_preemptions,
    output_ids,
)


def _with_one_preempted() -> Driver:
    """Two requests; the second has just been preempted with a step under way."""
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    driver.submit(18, max_tokens=14)
    driver.submit(13, max_tokens=14)
    driver.step()
    driver.step()
    driver.plan()
    driver.plan()
    assert driver.requests[1].branches[0].status is RequestStatus.WAITING
    return driver


def test_tokens_and_order_are_kept() -> None:
    driver = Driver()
    requests = [driver.submit(6), driver.submit(6)]
    driver.step()
    driver.step()
    driver.plan()
    known = [driver.scheduler.rows.num_tokens[r.branches[0].row] for r in requests]
    assert not driver.begin_epoch().finished
    plan = driver.plan()
    assert (plan.epoch, plan.step_id) == (2, 1)
    assert admitted(plan) == requests
    assert [len(new.token_ids) for new in plan.new_rows] == known
    driver.commit()


def test_nothing_is_cached_on_the_next_executor() -> None:
    driver = Driver(num_host_blocks=4)
    first = driver.run(12)
    driver.begin_epoch()
    assert driver.run(first.prompt.tolist()).num_cached_tokens == 0


def test_what_was_counted_stays_counted() -> None:
    policy = Policy(PreemptionMode.RECOMPUTE)
    driver = Driver(policy, num_device_blocks=9, max_model_len=29, num_host_blocks=4)
    for _ in range(2):
        driver.run(list(range(10, 20)), max_tokens=2, num_samples=2)
        driver.run(27)
    before = driver.scheduler.snapshot().counters
    assert min(before.num_evicted, before.num_copied, before.num_swapped_out) > 0
    assert min(before.num_swapped_in, before.num_hit_tokens_device) > 0
    driver.begin_epoch()
    after = driver.scheduler.snapshot().counters
    assert after.num_recoveries == before.num_recoveries + 1 == 1
    after.num_recoveries = 0
    assert after == before


def test_a_request_preempted_in_an_old_epoch_enters_the_new_one() -> None:
    driver = _with_one_preempted()
    first, second = driver.requests
    driver.commit()
    driver.commit()
    driver.scheduler.abort(first)
    driver.begin_epoch()
    assert admitted(driver.plan()) == [second]


def test_host_blocks_of_an_old_epoch_are_gone() -> None:
    driver = Driver(SWAP, num_device_blocks=9, max_model_len=29, num_host_blocks=16)
    older, younger = (driver.submit(8, max_tokens=20).branches[0] for _ in range(2))
    while not num_preemptions(driver):
        driver.step()
    assert younger.host_block_ids
    driver.begin_epoch()
    assert not younger.host_block_ids
    driver.scheduler.abort(older.request)
    plan = driver.plan()
    assert new_row_of(plan, younger).num_computed_tokens == 0
    assert not plan.moves.swap_in


def test_another_block_size_gives_blocks_new_names() -> None:
    driver = Driver(max_num_seqs=1)
    running = driver.submit(12)
    waiting = driver.submit(running.prompt.tolist())
    search = driver.submit(running.prompt.tolist(), beam=WIDTH_2)
    driver.plan()
    driver.begin_epoch(block_size=2, max_num_seqs=4, max_num_batched_tokens=64)
    plan = driver.plan()
    expected = [0, 10, 10]
    firsts = [request.branches[0] for request in (running, waiting, search)]
    assert [new_row_of(plan, first).num_computed_tokens for first in firsts] == expected
    driver.commit()
    driver.run_dry()


# ---- samples


def test_samples_begin_again_each_with_its_own_tokens_and_share_the_prompt() -> None:
    driver = Driver(max_num_batched_tokens=32)
    request = driver.submit(10, max_tokens=5, num_samples=3)
    driver.plan()
    driver.commit([101, 102, 103])
    driver.plan()
    driver.begin_epoch()
    plan = driver.plan()
    assert [new.branch for new in plan.new_rows] == request.branches
    assert [new.num_computed_tokens for new in plan.new_rows] == [0, 8, 8]
    assert [new.token_ids[-1] for new in plan.new_rows] == [101, 102, 103]
    assert all(new.logits_from is None for new in plan.new_rows)
    driver.run_dry()
    assert [len(output_ids(branch)) for branch in request.branches] == [5, 5, 5]


def test_samples_part_after_an_epoch_that_ended_before_they_did() -> None:
    driver = Driver()
    request = driver.submit(20, max_tokens=2, num_samples=3)
    driver.step()
    driver.begin_epoch()
    plans = driver.run_dry()
    assert [new.logits_from for plan in plans for new in plan.new_rows] == [None, 0, 0]
    assert [len(output_ids(branch)) for branch in request.branches] == [2, 2, 2]


# ---- beam searches


@pytest.mark.parametrize("is_planned", [True, False])
def test_beams_begin_again_with_what_was_decided(is_planned: bool) -> None:
    driver = Driver(max_num_batched_tokens=32)
    search = driver.submit(6, beam=WIDTH_2)
    driver.plan()
    driver.commit(scores=PARTING)
    if is_planned:
        driver.plan()
    driver.begin_epoch()
    plan = driver.plan()
    assert [new.branch for new in plan.new_rows] == search.branches
    assert [new.num_computed_tokens for new in plan.new_rows] == [0, 4]
    assert [new.token_ids[-1] for new in plan.new_rows] == [50, 51]
    assert not plan.forks
    driver.commit(scores=[{60: -0.1}, {61: -0.1}])
    assert driver.plan().inputs == [(0, 60), (1, 61)]


def test_a_search_lost_in_its_prefill_begins_anew() -> None:
    driver = Driver()
    search = driver.submit(20, beam=WIDTH_2)
    driver.step()
    driver.begin_epoch()
    assert list(driver.step().num_scheduled_tokens) == [16]
    driver.plan()
    driver.commit(scores=PARTING)
    assert driver.plan().inputs == [(0, 50), (1, 51)]
    assert [b.num_recoveries for b in search.branches] == [1, 1]


def test_a_smaller_executor_ends_a_search_that_can_gain_nothing_more() -> None:
    driver = Driver()
    beam = BeamParams(2, num_returned=2, early_stopping=EarlyStopping.NEVER)
    driver.submit(8, max_tokens=12, beam=beam)
    driver.plan()
    driver.commit(scores=[{EOS: -0.1, 50: -1.0, 51: -2.0}])
    driver.plan()
    # At twelve tokens the best beam's -3 would beat the second hypothesis' -0.5, at five it cannot.
    assert not driver.commit(scores=[{EOS: -0.001, 60: -2.0}, {61: -1.5}]).finished
    output = driver.begin_epoch(num_device_blocks=5)
    assert [(f.branch, f.stop_token_id, f.is_last) for f in output.finished] == [
        (0, EOS, False),
        (1, EOS, True),
    ]
    assert output.token_ids.tolist() == [EOS, 50, EOS]
    assert driver.try_plan() is None


def test_a_smaller_executor_shortens_searches_that_fit_it() -> None:
    driver = Driver()
    search = driver.submit(8, max_tokens=30, beam=WIDTH_2)
    driver.plan()
    driver.commit(scores=PARTING)
    assert not driver.begin_epoch(num_device_blocks=7).finished
    assert search.max_total_tokens == 17  # four blocks each, of which two are shared
    driver.plan()
    driver.commit(scores=[{60: -0.1}, {60: -0.1}])
    while not search.is_finished:
        driver.plan()
        output = go_on(driver)
    assert [f.num_output_tokens for f in output.finished] == [9, 9]


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"num_device_blocks": 3}])
def test_a_search_that_the_next_executor_cannot_hold_fails(limits: dict[str, int]) -> None:
    driver = Driver()
    search = driver.submit(12, beam=WIDTH_2)
    driver.plan()
    (finished,) = driver.begin_epoch(**limits).finished
    assert (finished.request, finished.status) == (search, RequestStatus.FINISHED_ERROR)
    assert "too large" in finished.error_message
    assert finished.is_last


# ---- suspicion


def test_a_request_in_flight_at_each_epoch_end_runs_alone_then_fails() -> None:
    driver = Driver()
    poison, other = driver.submit(6), driver.submit(6)
    for _ in range(2):
        driver.plan()
        driver.begin_epoch()
    # One loss while it ran alone may have had another reason; two in a row are a proof.
    assert admitted(driver.plan()) == [poison]
    assert not driver.begin_epoch().finished
    assert admitted(driver.plan()) == [poison]
    (finished,) = driver.begin_epoch().finished
    assert (finished.request, finished.status) == (poison, RequestStatus.FINISHED_ERROR)
    assert "in flight each time" in finished.error_message
    assert admitted(driver.plan()) == [other]


def test_a_suspect_runs_before_those_that_ran_before_it() -> None:
    driver = Driver(max_num_batched_tokens=8)
    first, second = driver.submit(6, max_tokens=30), driver.submit(6, max_tokens=30)
    for _ in range(2):
        assert driver.step().num_tokens == 8  # the first's prompt, and a part of the second's
        driver.plan()
        driver.begin_epoch()
    plan = driver.plan()
    assert admitted(plan) == [second]
    driver.commit()
    assert admitted(driver.plan()) == [first]
    assert second.branches[0].num_suspicions == 0


def test_a_search_in_flight_at_four_epoch_ends_fails_whole() -> None:
    driver = Driver()
    search = driver.submit(6, beam=WIDTH_2)
    for _ in range(3):
        driver.plan()
        assert not driver.begin_epoch().finished
    driver.plan()
    assert [f.request for f in driver.begin_epoch().finished] == [search]
    assert all(b.status is RequestStatus.FINISHED_ERROR for b in search.branches)


def test_candidates_clear_the_suspicion_of_their_lane() -> None:
    driver = Driver()
    search = driver.submit(6, max_tokens=30, beam=WIDTH_2)
    for _ in range(6):
        driver.plan()
        go_on(driver)
        driver.plan()
        driver.begin_epoch()
    assert all(b.status is RequestStatus.WAITING for b in search.branches)


def test_progress_clears_suspicion() -> None:
    driver = Driver()
    branch = driver.submit(6, max_tokens=30).branches[0]
    for _ in range(10):
        driver.plan()
        driver.plan()
        driver.commit()
        driver.begin_epoch()
    assert branch.num_recoveries == 10
    assert branch.status is RequestStatus.WAITING
    assert len(output_ids(branch)) == 10


def test_a_token_under_way_at_preemption_clears_suspicion() -> None:
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    second = [driver.submit(n, max_tokens=14) for n in (18, 13)][1].branches[0]
    driver.step()
    driver.plan()
    driver.begin_epoch()
    assert second.num_suspicions == 1
    driver.plan()
    driver.commit()
    for _ in range(3):
        driver.plan()
    while driver.scheduler.in_flight:
        driver.commit()
    assert second.num_preemptions == 1
    assert second.num_suspicions == 0


def test_a_branch_preempted_with_a_token_under_way_is_suspected_too() -> None:
    driver = _with_one_preempted()
    driver.begin_epoch()
    assert [r.branches[0].num_suspicions for r in driver.requests] == [1, 1]


def test_who_more_room_would_not_let_in_is_deferred() -> None:
    driver = _with_one_preempted()  # with a token under way
    waiting = driver.scheduler.waiting
    assert (driver.scheduler.num_deferred, len(waiting)) == (1, 1)
    while driver.scheduler.in_flight:
        driver.commit()
    assert (driver.scheduler.num_deferred, len(waiting)) == (0, 1)  # now it is only blocks


def test_two_losses_without_progress_do_not_make_service_serial() -> None:
    driver = Driver(max_num_seqs=4)
    requests = [driver.submit(3, max_tokens=20) for _ in range(4)]
    for _ in range(2):
        driver.plan()
        driver.begin_epoch()
    assert len(driver.step().new_rows) == 1
    assert len(driver.run_dry()) < 30
    assert all(r.branches[0].status is RequestStatus.FINISHED_LENGTH for r in requests)


def test_a_smaller_executor_shortens_what_it_can_and_fails_the_rest() -> None:
    driver = Driver()
    big, small, long = driver.submit(40), driver.submit(4), driver.submit(4, max_tokens=50)
    driver.plan()
    assert [f.request for f in driver.begin_epoch(num_device_blocks=6).finished] == [big]
    assert admitted(driver.plan()) == [small, long]
    assert (small.max_total_tokens, long.max_total_tokens) == (12, 21)


@pytest.mark.parametrize("num_usable_blocks", [37, 38, 39])
def test_lanes_that_begin_again_under_pressure_share_their_prompt(num_usable_blocks: int) -> None:
    """Else the search needs more blocks than it was admitted on, and waits for them for ever."""
    driver = Driver(
        num_device_blocks=num_usable_blocks + 1,
        max_num_seqs=10,
        max_num_batched_tokens=112,
        max_model_len=400,
    )
    for first in range(8):
        driver.submit([10 + first, 5, 5, 5], 11)
    longest = driver.limits.max_beam_tokens(32, 2)
    search = driver.submit(list(range(100, 132)), longest - 32, beam=BeamParams(2))
    for _ in range(8):
        driver.plan()
        _commit_alike(driver)
    driver.begin_epoch()
    while driver.try_plan() is not None or driver.scheduler.in_flight:
        _commit_alike(driver)
    assert search.is_finished


def test_a_lane_takes_cached_blocks_only_where_there_is_room() -> None:
    """Its turn may come after older rows took the blocks that it was promised."""
    driver = Driver(
        Policy(PreemptionMode.SWAP),
        num_device_blocks=53,
        max_num_seqs=10,
        max_num_batched_tokens=10,
        max_model_len=300,
        num_host_blocks=300,
    )
    first = driver.submit(43, 40)
    for token_id in range(10, 17):
        driver.submit([token_id], 70)
    search = driver.submit([99, 99], 40, beam=BeamParams(2))
    num_steps = 0
    while driver.try_plan() is not None:
        _commit_alike(driver)
        num_steps += search.branches[0].num_preemptions > 0
        if num_steps == 7 and not first.is_finished:
            driver.scheduler.abort(first)
    assert search.is_finished


def _commit_alike(driver: Driver) -> None:
    """Commit; a search's first step parts its beams, later ones keep them apart."""
    asked = driver.scheduler.in_flight[0].num_candidates
    lanes = [] if asked is None else asked[asked > 0].tolist()
    one = {50: -1.0, 51: -1.5}
    driver.commit(scores=[one] if len(lanes) == 1 else [{60: -0.1} for _ in lanes])

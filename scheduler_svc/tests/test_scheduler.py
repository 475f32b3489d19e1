"""Scenarios of the scheduler, one step at a time: prefill, decode, ends, pressure, order."""

from __future__ import annotations

import pytest

from scheduler_svc.policy import Policy
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.scheduler import StuckError
from scheduler_svc.tests.driver import EOS, TOKEN, Driver, admitted, num_preemptions, output_ids


def test_every_running_request_needs_a_token_of_the_budget() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        Driver(max_num_seqs=17)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(4, 0), (60, 5)])
def test_what_the_limits_cannot_hold_must_not_be_queued(
    num_prompt_tokens: int, max_tokens: int
) -> None:
    with pytest.raises(AssertionError):
        Driver().submit(num_prompt_tokens, max_tokens)


def test_branches_that_wait_for_nothing_are_a_bug_and_named() -> None:
    driver = Driver()
    request = driver.submit(4)
    request.branches[0].last_step_id = 9  # a step that nobody planned
    with pytest.raises(StuckError, match="0 branches run and 1 wait"):
        driver.plan()


# ---- one step after another


def test_prompts_are_chunked_to_the_budget_and_decodes_come_first() -> None:
    driver = Driver()
    driver.submit(20)
    driver.submit(10)
    first = driver.step()
    assert (first.num_decode_rows, list(first.num_scheduled_tokens)) == (0, [16])
    second = driver.step()
    assert list(second.num_scheduled_tokens) == [4, 10]
    third = driver.step()
    assert (third.num_decode_rows, list(third.num_scheduled_tokens)) == (2, [])
    assert driver.step().same_batch


def test_second_chunk_appends_blocks_to_the_row() -> None:
    driver = Driver()
    driver.submit(20)
    assert len(driver.step().new_rows[0].block_ids) == 4
    second = driver.step()
    assert not second.new_rows
    assert (second.append_counts, len(second.append_block_ids[0])) == ([1], 1)


def test_a_chunk_that_does_not_end_the_prompt_samples_nothing() -> None:
    driver = Driver()
    driver.submit(20)
    assert not len(driver.plan().sampling_rows)
    assert not len(driver.commit().token_ids)
    assert len(driver.plan().sampling_rows) == 1


def test_length_stop_is_foreseen() -> None:
    driver = Driver()
    request = driver.submit(4, max_tokens=3)
    plans = [driver.plan(), driver.plan(), driver.plan()]
    assert [plan.num_tokens for plan in plans] == [4, 1, 1]
    assert driver.try_plan() is None  # the window has room, but nothing is left to compute
    for _ in plans:
        output = driver.commit()
    assert request.branches[0].status is RequestStatus.FINISHED_LENGTH
    assert output.finished[0].num_output_tokens == 3
    last = driver.plan()
    assert last.freed_rows == plans[0].rows.tolist()
    assert not last.same_batch


def test_stop_token_is_one_late_and_the_extra_token_is_dropped() -> None:
    driver = Driver()
    request = driver.submit(4)
    driver.plan()
    driver.plan()
    (finished,) = driver.commit(EOS).finished
    assert (finished.stop_token_id, finished.num_output_tokens, finished.is_last) == (EOS, 1, True)
    assert request.branches[0].status is RequestStatus.FINISHED_STOP
    assert not len(driver.commit().token_ids)
    assert driver.plan().freed_rows
    assert output_ids(request.branches[0]) == [EOS]


def test_another_requests_stop_token_is_an_ordinary_one() -> None:
    driver = Driver()
    driver.submit(4)
    driver.requests[0].stop_token_ids = frozenset()
    other = driver.submit(4)
    driver.plan()
    assert [f.request for f in driver.commit(EOS).finished] == [other]


def test_a_late_stop_string_ends_the_request_and_drops_what_came_after_it() -> None:
    driver = Driver()
    request = driver.submit(4)
    for _ in range(3):
        driver.step()
    driver.plan()
    finished = driver.scheduler.stop(request.branches[0], 2)
    assert (finished.status, finished.num_output_tokens) == (RequestStatus.FINISHED_STOP, 2)
    assert not len(driver.commit().token_ids)
    driver.run_dry()


# ---- abort and failure


def test_abort_frees_in_the_next_plan_and_a_new_row_may_reuse_it() -> None:
    driver = Driver(max_num_seqs=1)
    request, other = driver.submit(4), driver.submit(5)
    driver.plan()
    driver.scheduler.abort(request)
    plan = driver.plan()
    assert plan.freed_rows == [0]
    assert [(new.row, new.branch.request) for new in plan.new_rows] == [(0, other)]
    assert not len(driver.commit().token_ids)  # the aborted request's
    assert driver.commit().request_ids.tolist() == [other.request_id]


def test_abort_of_a_waiting_request_says_nothing_to_the_executor() -> None:
    driver = Driver()
    driver.scheduler.abort(driver.submit(4))
    assert driver.try_plan() is None
    assert not driver.scheduler.has_work


def test_a_row_that_is_freed_with_nothing_to_run_goes_out_in_an_empty_plan() -> None:
    driver = Driver()
    request = driver.submit(4)
    driver.step()
    driver.scheduler.abort(request)
    assert driver.scheduler.has_work
    plan = driver.plan()
    assert (plan.freed_rows, plan.num_tokens) == ([0], 0)


def test_a_failed_row_ends_alone() -> None:
    driver = Driver()
    bad, good = driver.submit(4), driver.submit(4)
    driver.plan()
    output = driver.commit(failed_rows=[bad.branches[0].row])
    (finished,) = output.finished
    assert (finished.request, finished.status) == (bad, RequestStatus.FINISHED_ERROR)
    assert "not finite" in finished.error_message
    assert output.request_ids.tolist() == [good.request_id]


def test_a_failure_under_way_at_preemption_ends_the_request() -> None:
    driver = _about_to_preempt()
    first, second = driver.requests
    row = second.branches[0].row
    driver.plan()
    driver.plan()
    output = driver.commit(failed_rows=[row])
    assert [f.request for f in output.finished] == [second]
    driver.run_dry()
    assert len(output_ids(first.branches[0])) == 14


def test_a_queue_of_ended_requests_does_not_grow() -> None:
    driver = Driver()
    blocker = driver.submit(4)
    for _ in range(300):
        driver.scheduler.abort(driver.submit(4))
    assert list(driver.scheduler.waiting) == blocker.branches
    assert len(driver.scheduler.waiting._timely) < 100


# ---- pressure


def _about_to_preempt(max_tokens: int = 14) -> Driver:
    """Two requests, the second of which must give way at the plan after the next one."""
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    driver.submit(18, max_tokens=14)
    driver.submit(13, max_tokens)
    driver.step()
    driver.step()
    return driver


def test_the_youngest_is_preempted_and_all_finish() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    requests = [driver.submit(8, max_tokens=20) for _ in range(3)]
    driver.run_dry()
    assert all(r.branches[0].status is RequestStatus.FINISHED_LENGTH for r in requests)
    assert all(len(output_ids(r.branches[0])) == 20 for r in requests)
    assert requests[0].branches[0].num_preemptions == 0
    assert num_preemptions(driver) > 0


def test_preempted_request_keeps_the_tokens_under_way() -> None:
    driver = _about_to_preempt()
    first, second = (request.branches[0] for request in driver.requests)
    driver.plan()
    driver.plan()
    assert second.status is RequestStatus.WAITING
    num_known = len(second.token_ids)
    assert second.request not in admitted(driver.plan())
    driver.commit()
    assert len(second.token_ids) == num_known + 1
    driver.run_dry()
    assert [len(output_ids(branch)) for branch in (first, second)] == [14, 14]


@pytest.mark.parametrize("token", [EOS, TOKEN])
def test_a_token_under_way_may_end_a_preempted_request(token: int) -> None:
    driver = _about_to_preempt(max_tokens=14 if token == EOS else 2)
    second = driver.requests[1].branches[0]
    driver.plan()
    driver.plan()
    assert second.status is RequestStatus.WAITING
    (finished,) = driver.commit([TOKEN, token]).finished
    assert (finished.request, finished.num_output_tokens) == (second.request, 2)
    assert finished.stop_token_id == (EOS if token == EOS else None)
    assert not len(driver.scheduler.waiting)
    driver.run_dry()


def test_no_admission_in_a_step_that_preempted() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    for _ in range(2):
        driver.submit(14, max_tokens=14)
    while num_preemptions(driver) == 0:
        plan = driver.step()
    assert not plan.new_rows


def test_a_row_that_finds_no_victim_sits_out_while_the_older_one_goes_on() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29, max_num_batched_tokens=32)
    older = driver.submit(15, max_tokens=14).branches[0]
    younger = driver.submit(16, max_tokens=4).branches[0]
    driver.step()
    assert driver.step().rows.tolist() == [older.row]
    assert younger.status is RequestStatus.RUNNING
    driver.run_dry()
    assert [len(output_ids(branch)) for branch in (older, younger)] == [14, 4]


def test_a_prefill_that_finds_no_victim_goes_as_far_as_the_blocks_do() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    driver.submit(12, max_tokens=8)
    driver.submit(20, max_tokens=4)
    assert list(driver.step().num_scheduled_tokens) == [12, 4]
    # The decoding row takes its fourth block first: of eight, three are left.
    assert list(driver.step().num_scheduled_tokens) == [12]
    driver.run_dry()
    assert [len(output_ids(r.branches[0])) for r in driver.requests] == [8, 4]


def test_after_two_preemptions_the_worst_case_is_reserved() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=33)
    older = driver.submit(4, max_tokens=4)
    branch = driver.submit(4, max_tokens=20).branches[0]  # 6 blocks at its longest
    branch.num_preemptions = 2
    driver.submit(5, max_tokens=4)
    assert admitted(driver.step()) == [older, branch.request]
    assert driver.scheduler.kv.num_unpromised == 1
    driver.run_dry()
    assert branch.num_preemptions == 2


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    driver = Driver(num_device_blocks=9, watermark_blocks=4, max_model_len=29)
    driver.submit(8)
    driver.submit(12)
    assert len(driver.step().new_rows) == 1
    driver = Driver(num_device_blocks=9, watermark_blocks=4, max_model_len=29)
    driver.submit(24, max_tokens=4)
    assert len(driver.step().new_rows) == 1


def test_nobody_overtakes_the_next_in_line() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    running, large, small = driver.submit(12), driver.submit(24, max_tokens=4), driver.submit(1)
    assert admitted(driver.step()) == [running]
    assert list(driver.scheduler.waiting) == [*large.branches, *small.branches]


# ---- other systems' ways


def _reserved(request: Request) -> int:
    return 18


def test_a_reservation_is_handed_out_at_admission() -> None:
    driver = Driver(Policy(reserve_tokens=_reserved))
    request = driver.submit(6, max_tokens=15)
    plans = driver.run_dry()
    assert len(plans[0].new_rows[0].block_ids) == 5
    # It holds 18 tokens; 20 are stored at the end.
    assert [len(plan.append_rows) for plan in plans].count(1) == 0
    assert len(output_ids(request.branches[0])) == 15


def test_reservations_bound_how_many_run() -> None:
    driver = Driver(Policy(reserve_tokens=_reserved), num_device_blocks=13)
    requests = [driver.submit(4, max_tokens=4) for _ in range(3)]
    assert admitted(driver.step()) == requests[:2]
    assert driver.scheduler.snapshot().device.num_unused == 2 * (20 - 4)
    driver.run_dry()


def test_a_static_batch_lets_nobody_in_before_all_have_ended() -> None:
    driver = Driver(Policy(is_static=True))
    first = [driver.submit(12, max_tokens=n) for n in (2, 4, 6)]
    driver.step()
    assert len(driver.scheduler.running) == 3  # although the budget is used up
    late = driver.submit(4)
    while not all(request.is_finished for request in first):
        assert late not in admitted(driver.step())
    assert admitted(driver.step()) == [late]
    driver.run_dry()

"""Scenarios of the scheduler, one step at a time; the executor is a counter."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.scheduler import Limits, Scheduler
from scheduler_svc.step_plan import StepOutput, StepPlan, StepTokens

EOS = 2


class Driver:
    """A scheduler, and answers to its plans: the token is 100 + position unless told otherwise."""

    def __init__(self, **limits: int) -> None:
        fields = {
            "num_device_blocks": 33,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "vocab_size": 256,
        }
        self.limits = Limits(**{**fields, **limits})
        self.scheduler = Scheduler(self.limits)
        self.scheduler.begin_epoch(1, self.limits)
        self.num_submitted = 0

    def submit(self, num_prompt_tokens: int, max_tokens: int = 8) -> Request:
        self.num_submitted += 1
        request = Request(
            key=self.num_submitted,
            frontend=0,
            request_id=self.num_submitted,
            token_ids=np.arange(10, 10 + num_prompt_tokens, dtype=np.int32),
            num_prompt_tokens=num_prompt_tokens,
            max_total_tokens=num_prompt_tokens + max_tokens,
            arrival_ns=0,
            stop_token_ids=frozenset([EOS]),
        )
        self.scheduler.submit(request)
        return request

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(0)
        assert plan is not None
        self.scheduler.kv.check_conservation()
        return plan

    def commit(
        self, token: int | None = None, failed_rows: Iterable[int] = (), epoch: int = 1
    ) -> StepOutput:
        plan = self.scheduler.in_flight[0]
        tokens = np.full(len(plan.sampling_rows), token or 100, np.int32)
        result = StepTokens(epoch, plan.step_id, tokens, frozenset(failed_rows))
        output = self.scheduler.commit(result)
        self.scheduler.kv.check_conservation()
        return output

    def step(self, token: int | None = None) -> StepPlan:
        plan = self.plan()
        self.commit(token)
        return plan

    def run_dry(self, max_steps: int = 1000) -> int:
        for count in range(max_steps):
            if self.scheduler.plan(0) is None and not self.scheduler.in_flight:
                assert self.scheduler.kv.pool.num_used == 0
                return count
            self.commit()
        raise AssertionError("no end")


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


def test_length_stop_is_foreseen() -> None:
    driver = Driver()
    request = driver.submit(4, max_tokens=3)
    plans = [driver.plan(), driver.plan(), driver.plan()]
    assert [plan.num_tokens for plan in plans] == [4, 1, 1]
    assert driver.scheduler.plan(0) is None  # the window has room, but nothing is left to compute
    for _ in plans:
        output = driver.commit()
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert output.finished[0].num_output_tokens == 3
    last = driver.plan()
    assert last.freed_rows == plans[0].rows.tolist()
    assert not last.same_batch


def test_stop_token_is_one_late_and_the_extra_token_is_dropped() -> None:
    driver = Driver()
    request = driver.submit(4)
    driver.plan()
    driver.plan()
    assert driver.commit(EOS).finished[0].stop_token_id == EOS
    assert request.status is RequestStatus.FINISHED_STOP
    assert len(driver.commit().token_ids) == 0
    assert driver.plan().freed_rows
    assert request.token_ids.tolist() == [10, 11, 12, 13, EOS]


def test_abort_frees_in_the_next_plan_and_a_new_row_may_reuse_it() -> None:
    driver = Driver(max_num_seqs=1)
    request = driver.submit(4)
    other = driver.submit(5)
    driver.plan()
    driver.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    plan = driver.plan()
    assert plan.freed_rows == [0]
    assert [(new.row, new.request) for new in plan.new_rows] == [(0, other)]
    assert len(driver.commit().token_ids) == 0  # the aborted request's
    assert driver.commit().request_ids.tolist() == [other.request_id]


def test_abort_of_a_waiting_request_says_nothing_to_the_executor() -> None:
    driver = Driver()
    request = driver.submit(4)
    driver.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    assert driver.scheduler.plan(0) is None
    assert not driver.scheduler.has_work


def test_the_youngest_is_preempted_and_all_finish() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    requests = [driver.submit(8, max_tokens=20) for _ in range(3)]
    driver.run_dry()
    assert all(r.status is RequestStatus.FINISHED_LENGTH for r in requests)
    assert all(len(r.token_ids) == 28 for r in requests)
    assert requests[0].num_preemptions == 0
    assert driver.scheduler.num_preemptions > 0


def test_preempted_request_keeps_the_tokens_under_way() -> None:
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    first, second = driver.submit(18, max_tokens=14), driver.submit(13, max_tokens=14)
    driver.step()
    driver.step()
    driver.plan()
    driver.plan()  # the first one needs a block: the second one is preempted with a step under way
    assert second.status is RequestStatus.WAITING
    num_known = len(second.token_ids)
    assert not any(new.request is second for new in driver.plan().new_rows)
    driver.commit()
    assert len(second.token_ids) == num_known + 1
    driver.run_dry()
    assert [len(r.token_ids) for r in (first, second)] == [32, 27]


def test_no_admission_in_a_step_that_preempted() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    for _ in range(2):
        driver.submit(14, max_tokens=14)
    while driver.scheduler.num_preemptions == 0:
        plan = driver.step()
    assert not plan.new_rows


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    driver = Driver(num_device_blocks=9, watermark_blocks=4, max_model_len=29)
    driver.submit(8)
    driver.submit(12)
    assert len(driver.step().new_rows) == 1
    driver = Driver(num_device_blocks=9, watermark_blocks=4, max_model_len=29)
    driver.submit(24, max_tokens=4)
    assert len(driver.step().new_rows) == 1


def test_a_failed_row_ends_alone() -> None:
    driver = Driver()
    bad, good = driver.submit(4), driver.submit(4)
    driver.plan()
    output = driver.commit(failed_rows=[bad.row])
    assert [f.request for f in output.finished] == [bad]
    assert bad.status is RequestStatus.FINISHED_ERROR
    assert output.request_ids.tolist() == [good.request_id]


def test_new_epoch_keeps_tokens_and_order() -> None:
    driver = Driver()
    requests = [driver.submit(6), driver.submit(6)]
    driver.step()
    driver.step()
    driver.plan()
    known = [driver.scheduler.rows.num_tokens[r.row] for r in requests]
    output = driver.scheduler.begin_epoch(2, driver.limits)
    assert not output.finished
    plan = driver.plan()
    assert (plan.epoch, plan.step_id) == (2, 1)
    assert [new.request for new in plan.new_rows] == requests
    assert [len(new.token_ids) for new in plan.new_rows] == known
    driver.commit(epoch=2)


def test_a_request_preempted_in_an_old_epoch_enters_the_new_one() -> None:
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    first, second = driver.submit(18, max_tokens=14), driver.submit(13, max_tokens=14)
    driver.step()
    driver.step()
    driver.plan()
    driver.plan()  # preempts the second one with a step under way
    assert second.status is RequestStatus.WAITING
    driver.commit()
    driver.commit()
    driver.scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    driver.scheduler.begin_epoch(2, driver.limits)
    assert [new.request for new in driver.plan().new_rows] == [second]


def test_a_request_in_flight_at_each_epoch_end_runs_alone_then_fails() -> None:
    driver = Driver()
    poison, other = driver.submit(6), driver.submit(6)
    for epoch in (2, 3):
        driver.plan()
        driver.scheduler.begin_epoch(epoch, driver.limits)
    assert [new.request for new in driver.plan().new_rows] == [poison]
    output = driver.scheduler.begin_epoch(4, driver.limits)
    assert [f.request for f in output.finished] == [poison]
    assert poison.status is RequestStatus.FINISHED_ERROR
    assert [new.request for new in driver.plan().new_rows] == [other]


def test_progress_clears_suspicion() -> None:
    driver = Driver()
    request = driver.submit(6, max_tokens=30)
    for epoch in range(2, 12):
        driver.plan()
        driver.plan()
        driver.commit(epoch=epoch - 1)
        driver.scheduler.begin_epoch(epoch, driver.limits)
    assert request.num_recoveries == 10
    assert request.status is RequestStatus.WAITING
    assert len(request.token_ids) == 16


def test_a_token_under_way_at_preemption_clears_suspicion() -> None:
    driver = Driver(num_device_blocks=10, max_num_batched_tokens=18, max_model_len=33)
    _, second = driver.submit(18, max_tokens=14), driver.submit(13, max_tokens=14)
    driver.step()
    driver.plan()
    driver.scheduler.begin_epoch(2, driver.limits)
    assert second.num_suspicions == 1
    driver.plan()
    driver.commit(epoch=2)
    driver.plan()
    driver.plan()
    driver.plan()
    while driver.scheduler.in_flight:
        driver.commit(epoch=2)
    assert second.num_preemptions == 1
    assert second.num_suspicions == 0


def test_two_losses_without_progress_do_not_make_service_serial() -> None:
    driver = Driver(max_num_seqs=4)
    requests = [driver.submit(3, max_tokens=20) for _ in range(4)]
    for epoch in (2, 3):
        driver.plan()
        driver.scheduler.begin_epoch(epoch, driver.limits)
    assert len(driver.plan().new_rows) == 1
    driver.commit(epoch=3)
    num_steps = 1
    while driver.scheduler.plan(0) is not None:
        driver.commit(epoch=3)
        num_steps += 1
    assert all(r.status is RequestStatus.FINISHED_LENGTH for r in requests)
    assert num_steps < 30


def test_a_queue_of_ended_requests_does_not_grow() -> None:
    driver = Driver()
    blocker = driver.submit(4)
    for _ in range(1000):
        driver.scheduler.finish(driver.submit(4), RequestStatus.FINISHED_ABORTED)
    assert list(driver.scheduler.waiting) == [blocker]
    assert len(driver.scheduler.waiting._heap) < 100


def test_a_smaller_executor_shortens_what_it_can_and_fails_the_rest() -> None:
    driver = Driver()
    big, small, long = driver.submit(40), driver.submit(4), driver.submit(4, max_tokens=50)
    driver.plan()
    fields = {f: getattr(driver.limits, f) for f in driver.limits.__slots__}
    output = driver.scheduler.begin_epoch(2, Limits(**{**fields, "num_device_blocks": 6}))
    assert [f.request for f in output.finished] == [big]
    assert [new.request for new in driver.plan().new_rows] == [small, long]
    assert (small.max_total_tokens, long.max_total_tokens) == (12, 21)


def test_every_running_request_needs_a_token_of_the_budget() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        Driver(max_num_seqs=17)

"""Classes, deadlines, and who is dropped, of a scheduler driven step by step."""

from __future__ import annotations

import random

import pytest

from scheduler_svc.cost_model import CostModel
from scheduler_svc.pace import CAUTION, Pace
from scheduler_svc.planner import OVERLOAD_MEMORY_NS
from scheduler_svc.policy import pick_victim
from scheduler_svc.request import Branch, Request, RequestStatus
from scheduler_svc.tests.driver import PLAN_NS, Driver, make_request
from scheduler_svc.waiting_queue import MAX_OVERTAKEN_NS, WaitingQueue

FAR = 10**15


def admitted(driver: Driver) -> list[int]:
    """Keys of all requests in the order in which they entered."""
    driver.run_dry()
    ran = [request for request in driver.requests if request.place]
    return [request.key for request in sorted(ran, key=lambda request: request.place)]


def one_at_a_time() -> Driver:
    """A driver with one row, which request 1 holds for a while."""
    driver = Driver(max_num_seqs=1)
    driver.submit(4, max_tokens=3)
    driver.step()
    return driver


# ---- the queue


def queued(*requests: Request) -> list[int]:
    queue = WaitingQueue()
    for request in requests:
        queue.push(request.branches[0])
    return [queue.pop().request.key for _ in requests]


def test_class_then_latest_start_then_arrival() -> None:
    requests = [
        make_request(1, priority=-1, latest_start_ns=1),
        make_request(2, latest_start_ns=9),
        make_request(3, latest_start_ns=5),
        make_request(4, latest_start_ns=9),
        make_request(5, priority=2, latest_start_ns=99),
    ]
    assert queued(*requests) == [5, 3, 2, 4, 1]


def test_who_has_run_goes_before_all_others_in_order_of_entry() -> None:
    requests = [
        make_request(1, priority=10, latest_start_ns=0),
        make_request(2, place=2),
        make_request(3, place=1, priority=-10),
    ]
    assert queued(*requests) == [3, 2, 1]


def test_late_ones_yield_to_everybody_and_are_found() -> None:
    queue = WaitingQueue()
    late, other = make_request(1, deadline_ns=7, priority=3), make_request(2, priority=-3)
    queue.push(late.branches[0])
    assert queue.peek_late() is None
    queue.demote()
    queue.push(other.branches[0])
    assert (len(queue), queue.num_prompt_tokens) == (2, 2)
    assert queue.peek_late() is late.branches[0]
    assert [queue.pop().request.key for _ in range(2)] == [2, 1]
    assert (len(queue), queue.num_prompt_tokens) == (0, 0)


def test_prompt_tokens_are_those_of_requests_that_have_not_run() -> None:
    queue = WaitingQueue()
    first, second = make_request(1, [5] * 7), make_request(2, [5] * 9)
    queue.push(first.branches[0])
    queue.push(second.branches[0])
    assert queue.num_prompt_tokens == 16
    second.branches[0].move_to(RequestStatus.FINISHED_ABORTED)
    queue.discard(second.branches[0])
    assert queue.num_prompt_tokens == 7
    queue.pop()
    first.place = 1
    queue.push(first.branches[0])
    assert queue.num_prompt_tokens == 0


def test_victims_are_the_last_to_have_entered_whatever_their_arrival() -> None:
    early, late = make_request(1, place=2).branches[0], make_request(2, place=1).branches[0]
    assert pick_victim([early, late], late) is early
    assert pick_victim([early, late], early) is None


# ---- the scheduler


@pytest.mark.parametrize("seed", range(20))
def test_without_deadlines_and_classes_the_order_is_that_of_arrival(seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_device_blocks=rng.randint(12, 24))
    for _ in range(30):
        driver.submit(rng.randint(1, 12), max_tokens=rng.randint(1, 20))
        if rng.random() < 0.5 and driver.try_plan() is not None:
            driver.commit()
        running = list(driver.scheduler.running.values())
        assert sorted(running, key=lambda b: b.age) == sorted(running, key=lambda b: b.key)
    waiting = driver.scheduler.waiting
    order = [entry[1].key for entry in sorted(waiting._timely, key=lambda entry: entry[0])]
    assert order == sorted(order)
    assert admitted(driver) == list(range(1, 31))
    assert driver.scheduler.snapshot().counters.num_expired == 0


def test_least_slack_first_and_none_last() -> None:
    driver = one_at_a_time()
    for deadline_ns in (0, FAR, FAR // 2, FAR // 3):
        driver.submit(4, max_tokens=2, deadline_ns=deadline_ns and 10**9 + deadline_ns // 10**7)
    assert admitted(driver) == [1, 5, 4, 3, 2]


def test_no_deadline_counts_as_one_that_is_a_minute_away() -> None:
    driver = one_at_a_time()
    driver.submit(4, max_tokens=2)
    driver.submit(4, max_tokens=2, deadline_ns=driver.now_ns + 2 * MAX_OVERTAKEN_NS)
    assert admitted(driver) == [1, 2, 3]


def test_a_higher_class_goes_first_whatever_the_slack() -> None:
    driver = one_at_a_time()
    driver.submit(4, max_tokens=2, deadline_ns=10**6)
    driver.submit(4, max_tokens=2, priority=1)
    driver.submit(4, max_tokens=2, priority=-1, deadline_ns=10**6)
    assert admitted(driver) == [1, 3, 2, 4]


def test_long_requests_have_less_slack_once_the_pace_is_known() -> None:
    driver = Driver(max_num_seqs=1)
    driver.run(4, max_tokens=20)
    driver.submit(4, max_tokens=3)
    driver.step()
    deadline_ns = driver.now_ns + 10**6
    driver.submit(4, max_tokens=2, deadline_ns=deadline_ns)
    driver.submit(4, max_tokens=20, deadline_ns=deadline_ns)
    assert admitted(driver) == [1, 2, 4, 3]


def test_who_has_missed_its_deadline_is_dropped_before_its_prefill() -> None:
    driver = one_at_a_time()
    lost = driver.submit(4, deadline_ns=driver.now_ns + PLAN_NS // 2)
    other = driver.submit(4)
    driver.step()
    assert driver.scheduler.take_expired() == [lost]
    assert driver.scheduler.take_expired() == []
    assert lost.is_finished
    assert not lost.first_admitted_ns
    assert admitted(driver) == [1, other.key]
    counters = driver.scheduler.snapshot().counters
    assert (counters.num_expired, counters.num_finished) == (1, 3)


def test_a_prefill_that_would_end_too_late_is_not_begun_unless_it_is_cached() -> None:
    driver = Driver(max_num_seqs=1)
    driver.scheduler.set_cost_model(CostModel(token_ns=PLAN_NS))
    cached = driver.run([9] * 13).prompt.tolist()
    lost = driver.submit([8] * 13, max_tokens=1, deadline_ns=driver.now_ns + 8 * PLAN_NS)
    kept = driver.submit(cached, max_tokens=1, deadline_ns=driver.now_ns + 8 * PLAN_NS)
    driver.run_dry()
    assert driver.scheduler.take_expired() == [lost]
    assert kept.num_cached_tokens == 12


def test_a_request_that_runs_is_never_dropped() -> None:
    driver = Driver()
    request = driver.submit(4, deadline_ns=PLAN_NS + 1)
    driver.run_dry()
    assert request.branches[0].status is RequestStatus.FINISHED_LENGTH
    assert driver.scheduler.take_expired() == []


def test_late_ones_wait_for_all_others_and_run_if_there_are_none() -> None:
    driver = Driver(max_num_seqs=1)
    driver.run(4, max_tokens=20)
    driver.submit(4, max_tokens=5)
    driver.step()
    # It is expected to take twenty steps, and has ten when it arrives.
    driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10 * PLAN_NS)
    driver.submit(4, max_tokens=2)
    assert admitted(driver) == [1, 2, 4, 3]
    assert driver.scheduler.take_expired() == []


def miss_a_deadline(driver: Driver, num_plans: int = 40) -> None:
    """Run a request of twenty tokens through a pause, until its client gives up at its deadline."""
    missed = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + num_plans * PLAN_NS)
    driver.step()
    driver.now_ns = missed.deadline_ns
    driver.step()
    driver.scheduler.abort(missed)


def test_late_ones_enter_while_less_than_half_is_in_use() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    miss_a_deadline(driver)
    first = driver.submit(4, max_tokens=30)
    driver.step()
    # As above: expected to take longer than it has.
    early = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10 * PLAN_NS)
    driver.step()
    assert early.place  # beside one of four rows
    late = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10 * PLAN_NS)
    on_time = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10**9)
    driver.step()
    assert late.is_late
    assert (late.place, on_time.place > 0, first.place) == (0, True, 3)
    assert [branch.request for branch in driver.scheduler.waiting] == [late]


def test_late_ones_wait_where_half_of_the_blocks_are_in_use() -> None:
    driver = Driver(max_num_seqs=8, num_device_blocks=13)
    driver.run(4, max_tokens=20)
    miss_a_deadline(driver)
    for _ in range(2):
        driver.submit(12, max_tokens=20)
    driver.step()
    late = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10 * PLAN_NS)
    driver.step()
    assert late.is_late
    assert not late.place


def late_one_in_a_full_half(driver: Driver) -> Request:
    """A late request that meets two of four rows in use."""
    for _ in range(2):
        driver.submit(4, max_tokens=25)
    driver.step()
    late = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 10 * PLAN_NS)
    driver.step()
    assert late.is_late
    return late


def test_late_ones_enter_freely_while_no_deadline_is_missed() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    assert late_one_in_a_full_half(driver).place


def test_a_missed_deadline_keeps_late_ones_out_for_a_time() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    miss_a_deadline(driver)
    assert not late_one_in_a_full_half(driver).place
    driver.run_dry()
    driver.now_ns += OVERLOAD_MEMORY_NS
    assert late_one_in_a_full_half(driver).place


def with_all_rows_in_use() -> Driver:
    """A driver that knows a pace, and four requests for its four rows."""
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    for _ in range(4):
        driver.submit(4, max_tokens=40)
    return driver


def test_who_waited_past_its_latest_start_keeps_late_ones_out() -> None:
    driver = with_all_rows_in_use()
    driver.step()
    driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 30 * PLAN_NS)
    driver.run_dry()
    assert not late_one_in_a_full_half(driver).place


def test_a_request_that_became_hopeless_keeps_late_ones_out() -> None:
    driver = with_all_rows_in_use()
    driver.step()
    lost = driver.submit(4, max_tokens=2, deadline_ns=driver.now_ns + 20 * PLAN_NS)
    driver.now_ns = lost.deadline_ns + 1
    driver.run_dry()
    assert driver.scheduler.take_expired() == [lost]
    assert not late_one_in_a_full_half(driver).place


def test_who_is_cancelled_at_its_deadline_while_it_waits_keeps_late_ones_out() -> None:
    driver = with_all_rows_in_use()
    driver.submit(4, max_tokens=2)
    driver.step()
    lost = driver.submit(4, max_tokens=2, priority=-1, deadline_ns=driver.now_ns + 20 * PLAN_NS)
    driver.now_ns = lost.deadline_ns
    driver.step()
    driver.scheduler.abort(lost)
    driver.run_dry()
    assert not late_one_in_a_full_half(driver).place


def test_who_was_late_when_it_came_is_no_sign_of_overload() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    miss_a_deadline(driver, num_plans=10)
    assert late_one_in_a_full_half(driver).place


def test_a_client_that_leaves_early_is_no_sign_of_overload() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    left = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 100 * PLAN_NS)
    driver.step()
    driver.scheduler.abort(left)
    assert late_one_in_a_full_half(driver).place


def test_slack_that_was_gone_at_the_next_plan_is_no_sign_of_overload() -> None:
    driver = Driver(max_num_seqs=4)
    driver.run(4, max_tokens=20)
    driver.submit(4, max_tokens=40)
    driver.step()
    request = driver.submit(4, max_tokens=20, deadline_ns=driver.now_ns + 100 * PLAN_NS)
    driver.now_ns = request.latest_start_ns = request.arrival_ns + 5 * PLAN_NS
    driver.now_ns += 1
    driver.run_dry()
    assert request.is_late
    assert late_one_in_a_full_half(driver).place


def test_nothing_left_but_hopeless_ones_is_nothing_to_plan() -> None:
    driver = Driver()
    driver.now_ns = 10**6
    driver.submit(4, deadline_ns=1)
    assert driver.try_plan() is None
    assert not driver.scheduler.has_work


@pytest.mark.parametrize("seed", range(10))
def test_the_oldest_by_entry_is_never_a_victim_and_everybody_ends(seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_device_blocks=12, num_host_blocks=rng.choice([0, 6]))
    for _ in range(40):
        deadline_ns = rng.choice([0, driver.now_ns + rng.randint(1, 60) * PLAN_NS])
        driver.submit(
            rng.randint(1, 12),
            rng.randint(1, 20),
            priority=rng.randint(-1, 1),
            deadline_ns=deadline_ns,
            num_samples=rng.choice([1, 1, 3]),
        )
        oldest = min(driver.scheduler.running.values(), key=_age, default=None)
        if driver.try_plan() is not None:
            assert oldest is None or oldest.status is RequestStatus.RUNNING
            driver.commit()
    driver.run_dry()
    expired = driver.scheduler.take_expired()
    assert all(request.is_finished for request in driver.requests)
    assert all(request.deadline_ns and not request.place for request in expired)
    counters = driver.scheduler.snapshot().counters
    assert counters.num_preemptions_by_recompute + counters.num_preemptions_by_swap


def _age(branch: Branch) -> tuple[int, int]:
    return branch.age


def test_places_outlive_the_executor() -> None:
    driver = Driver(max_num_seqs=2)
    first = driver.submit(4, priority=-5)
    driver.step()
    driver.submit(4, priority=5)
    driver.begin_epoch()
    assert driver.scheduler.waiting.peek() is first.branches[0]


# ---- the pace


def test_pace_is_a_mean_then_a_moving_one() -> None:
    pace = Pace()
    assert (pace.expected_ns(100), pace.wait_ns(5, 1)) == (0.0, 0.0)
    pace.observe(1000, 10, 20)
    pace.observe(3000, 30, 60)
    assert pace.expected_ns(40) == CAUTION * 2000
    assert pace.expected_ns(10) == CAUTION * 500
    assert pace.wait_ns(6, 3) == 4000
    assert pace.wait_ns(1, 0) == 2000
    for _ in range(300):
        pace.observe(100, 10, 10)
    assert pace.expected_ns(10) == pytest.approx(CAUTION * 100, rel=0.01)

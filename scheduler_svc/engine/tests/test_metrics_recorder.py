"""What is recorded of steps and requests, driven by a real scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest

from blockyard.executor.v1 import executor_pb2
from scheduler_svc.cost_model import CostModel
from scheduler_svc.engine.metrics.recorder import MetricsRecorder
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Branch, Request
from scheduler_svc.step_plan import StepOutput, StepPlan
from scheduler_svc.telemetry.histogram import Histogram
from scheduler_svc.tests.driver import TOKEN, Driver

MS = 1_000_000
TIMINGS = {"apply_ns": 1, "forward_ns": 200, "sample_ns": 30, "idle_ns": 4000, "move_ns": 50_000}


class Recorded:
    """A scheduler at window 1 that a recorder watches, as the engine lets it."""

    def __init__(self, policy: Policy | None = None, **limits: int) -> None:
        self.driver = Driver(policy, **limits)
        self.recorder = MetricsRecorder()
        self.now_ns = 1000 * MS
        self.num_swapping_plans = 0

    def plan(self) -> StepPlan:
        self.driver.now_ns = self.now_ns
        plan = self.driver.plan()
        times_ns = (self.now_ns, self.now_ns + 60_000, self.now_ns + 100_000)
        self.recorder.planned(plan, self.driver.scheduler, times_ns)
        self.num_swapping_plans += bool(plan.moves.swap_in or plan.moves.swap_out)
        return plan

    def commit(self, tokens: Any = TOKEN, **timings: int) -> StepOutput:
        """Take the result 10 ms after the plan."""
        self.now_ns += 10 * MS
        scheduler = self.driver.scheduler
        self.recorder.arrived(scheduler.in_flight[0], scheduler.rows, self.now_ns)
        output = self.driver.commit(tokens)
        for finished in output.finished:
            self.recorder.finished(finished, self.now_ns)
        is_resting = not (scheduler.running or len(scheduler.waiting))
        message = executor_pb2.StepTimings(**{**TIMINGS, **timings})
        self.recorder.committed(message, 80_000, is_resting=is_resting)
        return output

    def step(self, tokens: Any = TOKEN, **timings: int) -> StepOutput:
        self.plan()
        return self.commit(tokens, **timings)

    def submit(self, *args: Any, trace_id: bytes = b"", **fields: Any) -> Request:
        request = self.driver.submit(*args, **{"arrival_ns": self.now_ns, **fields})
        self.recorder.queued(request, trace_id)
        return request


def total(histogram: Histogram) -> tuple[int, object]:
    """Observations and their sum; the driver's clock adds a little to each plan."""
    return sum(histogram.counts), pytest.approx(histogram.sum, rel=0.01)


def test_a_request_is_its_phases() -> None:
    recorded = Recorded()
    recorded.submit(20, 3, trace_id=b"t" * 16)
    recorded.now_ns += 5 * MS  # it waits
    for _ in range(4):  # two chunks, then two more tokens
        recorded.step()
    recorder = recorded.recorder
    assert total(recorder.queue) == (1, 0.005)
    assert total(recorder.prefill) == (1, 0.020)
    assert total(recorder.decode) == (1, 0.020)
    assert total(recorder.inference) == (1, 0.040)
    assert total(recorder.inter_token) == (2, 0.020)
    assert total(recorder.prompt_tokens) == (1, 20)
    assert total(recorder.generation_tokens) == (1, 3)
    assert total(recorder.longest_output) == (1, 3)
    assert total(recorder.max_tokens) == (1, 3)
    assert total(recorder.num_choices) == (1, 1)
    assert recorder.ended == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    for histogram in (recorder.queue, recorder.prefill, recorder.decode, recorder.inference):
        (exemplar,) = histogram.exemplars.values()
        assert exemplar.trace_id == b"t" * 16


def test_steps_are_timed_and_a_bubble_needs_work() -> None:
    recorded = Recorded()
    recorded.submit(20, 2)
    for _ in range(3):
        recorded.step()
    recorder = recorded.recorder
    assert total(recorder.plan) == (3, 3 * 60e-6)
    assert total(recorder.encode) == (3, 3 * 40e-6)
    assert total(recorder.commit) == (3, 3 * 80e-6)
    assert total(recorder.step_tokens) == (3, 21)
    assert total(recorder.window_bubble) == (2, 8e-6)  # there was nothing to do before the first
    assert recorder.device_ns == {"forward": 600, "sample": 90, "idle": 12_000}
    assert recorder.apply_ns == 3
    recorded.submit(4, 2)  # the executor has rested meanwhile
    recorded.step()
    assert total(recorder.window_bubble) == (2, 8e-6)


def test_branches_count_by_themselves_and_their_request_once() -> None:
    recorded = Recorded()
    recorded.submit(4, 4, num_samples=2)
    recorded.step()
    recorded.step([TOKEN, 2])  # the second sample stops
    while recorded.driver.scheduler.running:
        recorded.step()
    recorder = recorded.recorder
    assert recorder.ended == {"stop": 1, "length": 1, "abort": 0, "error": 0}
    assert total(recorder.generation_tokens) == (2, 6)
    assert total(recorder.longest_output) == (1, 4)
    assert total(recorder.num_choices) == (1, 2)
    assert total(recorder.inter_token) == (4, 0.040)
    assert total(recorder.prefill) == (1, 0.010)


def test_what_ends_early_is_counted_by_its_reason_and_forgotten() -> None:
    recorded = Recorded()
    aborted, expired = (recorded.submit(4, 8, trace_id=b"t" * 16) for _ in range(2))
    recorded.recorder.expired(expired)
    recorded.driver.scheduler.drop(expired)
    recorded.step()
    recorded.recorder.aborted(aborted)
    assert recorded.recorder.ended["abort"] == 1
    assert total(recorded.recorder.inference)[0] == 0
    assert not recorded.recorder._trace_ids


def test_a_token_for_a_branch_that_left_counts_for_nobody() -> None:
    recorded = Recorded()
    first = recorded.submit(4, 8)
    recorded.step()
    recorded.plan()
    recorded.driver.scheduler.abort(first)
    recorded.submit(4, 8)
    recorded.commit()
    assert total(recorded.recorder.inter_token)[0] == 0


def preempted(mode: PreemptionMode, **limits: int) -> Recorded:
    """Two requests that do not fit at once: the younger one is preempted and runs again."""
    recorded = Recorded(Policy(mode), num_device_blocks=8, max_num_seqs=2, **limits)
    recorded.submit(8, 14)
    recorded.submit(8, 14)
    while recorded.driver.scheduler.running or len(recorded.driver.scheduler.waiting):
        recorded.step(idle_ns=0)
    return recorded


def test_recomputing_costs_tokens_and_their_share_of_the_forward_time() -> None:
    recorded = preempted(PreemptionMode.RECOMPUTE)
    recorder, counters = recorded.recorder, recorded.driver.scheduler.snapshot().counters
    assert counters.num_preemptions_by_recompute == 1
    assert recorder.num_recomputed_tokens > 0
    assert 0 < recorder.recompute_ns <= recorder.device_ns["forward"]
    assert recorder.swap_ns == 0
    # The time away is time between two tokens.
    assert total(recorder.inter_token)[0] == 2 * 13
    assert max(i for i, count in enumerate(recorder.inter_token.counts) if count) > 2


@pytest.mark.parametrize("move_ns", [50_000, 0])
def test_swapping_costs_what_was_measured_or_what_it_should(move_ns: int) -> None:
    recorded = Recorded(
        Policy(PreemptionMode.SWAP),
        num_device_blocks=8,
        max_num_seqs=2,
        num_host_blocks=8,
        block_bytes=1000,
    )
    recorded.driver.scheduler.set_cost_model(CostModel(1, 1, 1, swap_bytes_per_s=1e6))
    recorded.submit(8, 14)
    recorded.submit(8, 14)
    while recorded.driver.scheduler.running or len(recorded.driver.scheduler.waiting):
        recorded.step(move_ns=move_ns)
    counters = recorded.driver.scheduler.snapshot().counters
    num_blocks = counters.num_swapped_out + counters.num_swapped_in
    assert num_blocks
    expected_ns = move_ns * recorded.num_swapping_plans or num_blocks * 1e6
    assert recorded.recorder.swap_ns == pytest.approx(expected_ns)


def test_a_lost_executor_leaves_nothing_in_flight() -> None:
    recorded = Recorded()
    recorded.submit(4, 8)
    recorded.step()
    recorded.plan()
    recorded.recorder.epoch_ended()
    recorded.driver.scheduler.begin_epoch(2, recorded.driver.limits)
    recorded.driver._tables.clear()
    recorded.now_ns += 100 * MS
    recorded.step()
    assert recorded.recorder.num_recomputed_tokens == 5
    assert total(recorded.recorder.inter_token) == (1, 0.110)


@pytest.mark.parametrize("seed", range(20))
def test_token_times_are_those_of_a_plain_count(seed: int) -> None:
    """Random arrivals, aborts and preemptions, against one branch after another."""
    rng = random.Random(seed)
    recorded = Recorded(num_device_blocks=rng.choice([12, 33]), max_num_seqs=4)
    last_ns: dict[Branch, int] = {}
    count, total_ns = 0, 0
    for _ in range(80):
        scheduler = recorded.driver.scheduler
        if rng.random() < 0.2:
            recorded.submit(rng.randint(1, 12), rng.randint(1, 12))
        if scheduler.running and rng.random() < 0.05:
            scheduler.abort(next(iter(scheduler.running.values())).request)
        if not scheduler.has_work:
            continue
        plan = recorded.plan()
        rows = [scheduler.rows.resident(row) for row in plan.sampling_rows.tolist()]
        recorded.now_ns += rng.randint(0, 30) * MS
        recorded.commit()
        for branch in rows:
            if branch in last_ns:
                count += 1
                total_ns += recorded.now_ns - last_ns[branch]
            last_ns[branch] = recorded.now_ns
    assert sum(recorded.recorder.inter_token.counts) == count > 20
    assert recorded.recorder.inter_token.sum == pytest.approx(total_ns / 1e9)

"""What is read off a plan log."""

from __future__ import annotations

from benchmarks.step_log import round_trip_ns
from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.executor.v1 import executor_pb2 as pb


def called(now_ns: int) -> log_pb.PlanCall:
    return log_pb.PlanCall(now_ns=now_ns)


def result(step_id: int, device_ns: int) -> pb.StepResult:
    timings = pb.StepTimings(forward_ns=device_ns - 5, sample_ns=5)
    return pb.StepResult(step_id=step_id, timings=timings)


def test_the_round_trip_is_that_of_steps_with_nothing_before_them() -> None:
    """Step 2 waits for step 1; step 3 is alone again."""
    events = [called(100), pb.StepPlan(step_id=1), called(110), pb.StepPlan(step_id=2)]
    events += [result(1, 1000), called(1400), result(2, 500), called(1900)]
    events += [called(5000), pb.StepPlan(step_id=3), result(3, 70), called(5100)]
    assert round_trip_ns(events) == (300 + 30) / 2


def test_a_lost_executor_ends_the_round_trip() -> None:
    events = [called(100), pb.StepPlan(step_id=1), result(1, 50)]
    events += [log_pb.EpochBegin(), called(9000), pb.StepPlan(step_id=1), called(9001)]
    assert round_trip_ns(events) == 0
    assert round_trip_ns([*events, result(1, 60), called(9100)]) == 40


def test_no_lone_step_tells_nothing() -> None:
    assert round_trip_ns([called(1)]) == 0

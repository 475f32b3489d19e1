from __future__ import annotations

from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc.engine.beam_pace import MAX_DELAY, BeamPace

STEP_NS = 10_000_000


def observed(pace: BeamPace, idle_ns: int, count: int = 200) -> BeamPace:
    """A pace that saw so many steps of STEP_NS, each after this much idleness."""
    timings = pb.StepTimings(
        queue_ns=5 * STEP_NS,
        apply_ns=STEP_NS // 10,
        forward_ns=8 * STEP_NS // 10,
        sample_ns=STEP_NS // 10,
        idle_ns=idle_ns,
    )
    for _ in range(count):
        pace.observe(timings)
    return pace


def test_plans_go_out_at_once_until_steps_were_measured() -> None:
    assert not BeamPace().should_hold


def test_a_small_bubble_is_worth_waiting_for_and_a_large_one_is_not() -> None:
    limit_ns = int(MAX_DELAY * STEP_NS)
    assert observed(BeamPace(), limit_ns * 9 // 10).should_hold
    assert not observed(BeamPace(), limit_ns * 11 // 10).should_hold


def test_after_many_steps_without_idleness_holding_is_tried_again() -> None:
    pace = observed(BeamPace(), STEP_NS // 2)
    assert not observed(pace, 0, count=50).should_hold
    assert observed(pace, 0, count=500).should_hold
    pace = observed(pace, STEP_NS // 2)
    assert not pace.should_hold
    assert observed(pace, STEP_NS // 100).should_hold


def test_one_long_pause_is_no_bubble() -> None:
    """The device was idle because nobody asked for anything."""
    pace = observed(BeamPace(), STEP_NS // 100)
    observed(pace, 1000 * STEP_NS, count=1)
    assert pace.should_hold


def test_it_follows_the_executor() -> None:
    pace = observed(BeamPace(), STEP_NS // 100)
    assert not observed(pace, STEP_NS // 2, count=20).should_hold

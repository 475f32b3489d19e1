from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blockyard.simulate.meter import Meter, Timeline
from blockyard.simulate.policies import POLICY_NAMES
from blockyard.simulate.run import Outcome, simulate
from blockyard.simulate.setup import SetupError, Sizes, blocks_in, make_setup
from blockyard.simulate.tests.setups import (
    EQUAL_STEPS,
    GPU,
    STEP_NS,
    conversation,
    ragged,
    requests,
    setup,
)
from blockyard.simulate.trace import NS_PER_S, Trace, TraceError


def test_sizes_that_contradict_each_other() -> None:
    with pytest.raises(SetupError, match="0 blocks hold no request"):
        setup(num_blocks=0)
    with pytest.raises(SetupError, match="3,000,000,000 blocks in a pool"):
        setup(num_host_blocks=3 * 10**9)
    with pytest.raises(SetupError, match=r"max_num_seqs \(256\)"):
        make_setup("blockyard", Sizes(100, max_num_batched_tokens=100), GPU)


def test_no_request_fits() -> None:
    with pytest.raises(TraceError, match="no request fits 2048 tokens"):
        simulate(requests((2047, 2)), setup())


def test_requests_that_are_too_long_are_counted() -> None:
    outcome = simulate(requests((10, 5), (2000, 100), (10, 5)), setup())
    assert (len(outcome.trace), outcome.num_skipped) == (2, 1)
    by_pool = simulate(requests((10, 5), (10, 24), (10, 23)), setup(num_blocks=2))
    assert by_pool.num_skipped == 1


def test_blocks_in() -> None:
    assert blocks_in(1.0, 16, EQUAL_STEPS) == 2**30 // 1600


@pytest.mark.parametrize("window", [1, 2, 3])
def test_one_request_takes_a_step_for_each_token(window: int) -> None:
    outcome = simulate(requests((100, 20), arrivals_s=[3.0]), setup(window=window))
    first_ns, finish_ns = outcome.served.first_token_ns[0], outcome.served.finish_ns[0]
    assert first_ns == 3 * NS_PER_S + STEP_NS
    assert finish_ns == 3 * NS_PER_S + 20 * STEP_NS
    assert outcome.busy_ns == 20 * STEP_NS


def test_a_late_request_joins_the_running_batch() -> None:
    trace = requests((100, 50), (100, 50), arrivals_s=[0.0, 0.0105])
    window_1, window_2 = (simulate(trace, setup(window=window)).served for window in (1, 2))
    # It waits for the step that runs when it arrives and, in a window of 2, for the one behind.
    assert window_1.first_token_ns[1] == 12 * STEP_NS
    assert window_2.first_token_ns[1] == 13 * STEP_NS
    assert window_1.finish_ns[0] == window_2.finish_ns[0] == 50 * STEP_NS


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_everything_is_served_and_given_back(policy: str, window: int) -> None:
    trace = ragged(120, seed=1)
    outcome = simulate(trace, setup(policy, num_blocks=400, window=window, profile=GPU))
    counters, device = outcome.final.counters, outcome.final.device
    assert counters.num_output_tokens == trace.num_output_tokens.sum()
    assert counters.num_finished == len(trace)
    assert device.num_free + device.num_cached + device.num_padding == device.num_slots
    assert (outcome.served.first_token_ns <= outcome.served.finish_ns).all()
    num_preemptions = counters.num_preemptions_by_recompute + counters.num_preemptions_by_swap
    assert outcome.served.num_preemptions.sum() == num_preemptions
    assert (num_preemptions > 0) == (policy == "blockyard")


def test_a_simulation_repeats_exactly() -> None:
    first, again = (simulate(ragged(80, seed=2), setup(num_blocks=300)) for _ in range(2))
    np.testing.assert_array_equal(first.served.finish_ns, again.served.finish_ns)
    np.testing.assert_array_equal(first.meter.unused_by_request, again.meter.unused_by_request)
    assert first.final == again.final


def test_static_batches_do_not_mix() -> None:
    outcome = simulate(ragged(64, seed=3), setup("static", num_blocks=32 * 128))
    served = outcome.served
    first, second = slice(0, 32), slice(32, 64)
    assert served.finish_ns[first].max() < served.first_token_ns[second].min()
    assert outcome.final.counters.num_preemptions_by_recompute == 0


def test_progress_adds_up() -> None:
    finished: list[int] = []
    simulate(ragged(50, seed=4), setup(), finished.append)
    assert sum(finished) == 50


# ---- the prefix cache and the host pool


def test_a_conversation_finds_its_beginning_cached() -> None:
    trace = conversation(5)
    cached = simulate(trace, setup()).served.num_cached_tokens
    assert trace.prefixes is not None
    # Turn i has the full trace blocks of turn i - 1, which are whole blocks of 16.
    assert cached.tolist() == [0, 0, 512, 1024, 1024]
    assert cached.sum() == trace.ideal_hit_ratio() * trace.num_prompt_tokens.sum()
    assert not simulate(trace, setup("orca-oracle")).served.num_cached_tokens.any()


def oversubscribed(preemption: str, num_host_blocks: int = 1000) -> Outcome:
    run = setup(num_blocks=160, profile=GPU, preemption=preemption, num_host_blocks=num_host_blocks)
    return simulate(ragged(60, seed=5, max_prompt=60, max_output=300), run)


def test_preemption_is_counted_by_kind() -> None:
    recomputing, swapping = oversubscribed("recompute"), oversubscribed("swap")
    without_host = oversubscribed("swap", num_host_blocks=0)
    for outcome in (recomputing, without_host):
        assert outcome.final.counters.num_preemptions_by_recompute > 0
        assert outcome.final.counters.num_preemptions_by_swap == 0
    assert swapping.final.counters.num_preemptions_by_swap > 0
    assert swapping.final.counters.num_swapped_in > 0


def test_auto_follows_the_cost_model() -> None:
    slow_link = replace(GPU, cost=replace(GPU.cost, swap_bytes_per_s=1e8))
    run = setup(num_blocks=160, profile=slow_link, num_host_blocks=1000)
    recomputing = simulate(ragged(60, seed=5, max_prompt=60, max_output=300), run)
    assert recomputing.final.counters.num_preemptions_by_swap == 0
    assert oversubscribed("auto").final.counters.num_preemptions_by_swap > 0


# ---- waste


def slots_by_formula(trace: Trace, policy: str) -> tuple[np.ndarray, np.ndarray]:
    """(stored, held) slots summed over the steps of each request [num_requests], from lengths.

    Step i of a request, from 0, stores its prompt and i tokens of its output.
    """
    stored, held = [], []
    for prompt, output in zip(
        trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True
    ):
        lengths = prompt + np.arange(output)
        reserved = {
            "blockyard": 0,
            "orca-max": 2048 - 1,
            "orca-pow2": prompt + 2 ** int(np.ceil(np.log2(output))),
            "orca-oracle": prompt + output - 1,
        }[policy]
        stored.append(lengths.sum())
        held.append((-(-np.maximum(lengths, reserved) // 16) * 16).sum())
    return np.array(stored), np.array(held)


@pytest.mark.parametrize("policy", ["blockyard", "orca-max", "orca-pow2", "orca-oracle"])
def test_waste_is_what_the_lengths_say(policy: str) -> None:
    # One at a time, planned one step at a time: nothing is held before its step.
    trace = ragged(12, seed=6)
    run = setup(policy, window=1)
    run = replace(run, limits=replace(run.limits, max_num_seqs=1))
    meter = simulate(trace, run).meter
    stored, held = slots_by_formula(trace, policy)
    np.testing.assert_allclose(meter.held_by_request, held * STEP_NS)
    np.testing.assert_allclose(meter.unused_by_request, (held - stored) * STEP_NS)
    assert meter.unused / meter.held == pytest.approx(1 - stored.sum() / held.sum())


@pytest.mark.parametrize("trace", [conversation(6).all_at_once(), ragged(60, seed=7)])
def test_the_meter_agrees_with_the_accounting(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Meter.advance
    num_checked = 0

    def checked(meter: Meter, now_ns: int, num_tokens_in_flight: int) -> None:
        nonlocal num_checked
        before = (meter._now_ns, meter.held, meter.unused)
        advance(meter, now_ns, num_tokens_in_flight)
        elapsed_ns = now_ns - before[0]
        if elapsed_ns:
            device = meter._scheduler.snapshot().device
            held = device.num_stored + device.num_in_flight + device.num_unused
            assert meter.held - before[1] == held * elapsed_ns
            assert meter.unused - before[2] == device.num_unused * elapsed_ns
            num_checked += 1

    monkeypatch.setattr(Meter, "advance", checked)
    simulate(trace, setup(num_blocks=300))
    assert num_checked >= 20


def test_a_timeline_stays_short_and_even() -> None:
    timeline = Timeline()
    for step in range(10_000):
        if step % timeline.stride == 0:
            timeline.add(step, 1, 2, 3, 4)
    assert 1024 < len(timeline.time_ns) <= 2048
    assert set(np.diff(timeline.time_ns)) == {timeline.stride}
    assert len(timeline.num_unused_slots) == len(timeline.time_ns)

"""The fitted price of a step."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import fake_info
from executor_svc.cost_model import (
    MIN_STEPS,
    WINDOW_STEPS,
    StepSamples,
    predict_ns,
    step_features,
)
from executor_svc.plan import Plan, decode
from executor_svc.runner import StepBatch

INFO = fake_info(64, block_size=16)  # 8 bytes a token
STEP_NS, TOKEN_NS, NS_PER_BYTE, NS_PER_SWAPPED_BYTE = 2e6, 5e4, 25.0, 100.0


def step(num_tokens: int, context: int, swapped: int = 0) -> tuple[Plan, StepBatch, int]:
    ids = list(range(swapped))
    plan = decode(pb.StepPlan(swap_out=pb.BlockPairs(src=ids, dst=ids)))
    one = np.array([num_tokens], np.int32)
    none = np.empty(0, np.int32)
    batch = StepBatch(
        rows=np.zeros(1, np.int32),
        num_scheduled_tokens=one,
        num_computed_tokens=np.array([context - num_tokens], np.int32),
        num_decode_rows=0,
        token_ids=np.zeros(num_tokens, np.int32),
        sampling_rows=none,
        logits_indices=none,
        sample_positions=none,
    )
    ns = STEP_NS + TOKEN_NS * num_tokens + NS_PER_BYTE * 8 * context
    return plan, batch, int(ns + NS_PER_SWAPPED_BYTE * INFO.block_bytes * swapped)


def varied(count: int) -> StepSamples:
    rng = random.Random(0)
    samples = StepSamples(INFO)
    for _ in range(count):
        tokens = rng.choice([1, 8, 64, 128])
        samples.add(*step(tokens, tokens + rng.randrange(4000), swapped=rng.choice([0, 0, 5])))
    return samples


def test_nothing_is_known_at_first() -> None:
    assert StepSamples(INFO).fit() == pb.CostModel()
    assert varied(MIN_STEPS - 1).fit() == pb.CostModel()


@pytest.mark.parametrize("count", [MIN_STEPS, 3 * WINDOW_STEPS])
def test_prices_are_found(count: int) -> None:
    model = varied(count).fit()
    assert model.step_ns == pytest.approx(STEP_NS, rel=0.01)
    assert model.token_ns == pytest.approx(TOKEN_NS, rel=0.01)
    assert model.kv_bytes_per_s == pytest.approx(1e9 / NS_PER_BYTE, rel=0.01)
    assert model.swap_bytes_per_s == pytest.approx(1e9 / NS_PER_SWAPPED_BYTE, rel=0.01)


def test_tokens_that_cost_nothing_are_found() -> None:
    """Steps of few tokens take as long as reading the weights does."""
    rng = random.Random(4)
    samples = StepSamples(INFO)
    for _ in range(WINDOW_STEPS):
        tokens = rng.choice([1, 60, 130, 200, 300, 700, 1500])
        plan, batch, _ = step(tokens, tokens)
        step_ns = STEP_NS + TOKEN_NS * max(0, tokens - 192) + NS_PER_BYTE * 8 * tokens
        samples.add(plan, batch, int(step_ns))
    model = samples.fit()
    assert model.free_tokens == 192
    assert model.step_ns == pytest.approx(STEP_NS, rel=0.01)
    assert model.token_ns == pytest.approx(TOKEN_NS, rel=0.02)


def test_the_price_of_pairs_is_found() -> None:
    """Long prompts take more than their tokens."""
    rng = random.Random(5)
    samples = StepSamples(INFO)
    pair_ns = 3.0
    for _ in range(WINDOW_STEPS):
        tokens, before = rng.choice([1, 500, 2000, 8000]), rng.choice([0, 1000, 4000])
        plan, batch, step_ns = step(tokens, tokens + before)
        num_pairs = sum(before + new for new in range(1, tokens + 1))
        samples.add(plan, batch, int(step_ns + pair_ns * num_pairs))
    model = samples.fit()
    assert model.pair_ns == pytest.approx(pair_ns, rel=0.01)
    assert model.token_ns == pytest.approx(TOKEN_NS, rel=0.02)


def test_prompts_of_one_length_do_not_tell_the_price_of_pairs() -> None:
    """Then the last one counts, and what it explains is not blamed on anything else."""
    pair_ns = 3.0

    def prefill(tokens: int, before: int) -> tuple[Plan, StepBatch, int]:
        plan, batch, step_ns = step(tokens, tokens + before)
        num_pairs = tokens * before + tokens * (tokens + 1) // 2
        return plan, batch, int(step_ns + pair_ns * num_pairs)

    def error(model: pb.CostModel, tokens: int) -> float:
        plan, batch, true_ns = prefill(tokens, 0)
        predicted_ns = predict_ns(model, np.array([step_features(INFO, plan, batch)]))[0]
        return abs(float(predicted_ns) / true_ns - 1)

    def window(samples: StepSamples, lengths: list[int], cached: list[int]) -> pb.CostModel:
        rng = random.Random(6)
        for _ in range(WINDOW_STEPS):
            samples.add(*prefill(rng.choice([1, *lengths]), rng.choice(cached)))
        return samples.fit()

    fresh = window(StepSamples(INFO), [1024], [0])
    assert fresh.pair_ns == 0
    assert error(fresh, 1024) < 0.01
    samples = StepSamples(INFO)
    known = window(samples, [500, 2000, 8000], [0, 1000, 4000])
    assert known.pair_ns == pytest.approx(pair_ns, rel=0.01)
    later = window(samples, [1024], [0])
    assert later.pair_ns == known.pair_ns
    assert error(later, 1024) < 0.01
    assert error(later, 8000) < 0.02 < error(fresh, 8000)


def test_equal_steps_tell_no_price() -> None:
    samples = StepSamples(INFO)
    for i in range(WINDOW_STEPS):
        samples.add(*step(8, 100 + i))
    assert samples.fit() == pb.CostModel()


def test_equal_steps_leave_the_prices_found_before() -> None:
    samples = varied(200)
    before = samples.fit()
    for i in range(WINDOW_STEPS):  # the window holds nothing else
        samples.add(*step(8, 100 + i))
    assert samples.fit() == before
    assert before.token_ns > 0


def test_steps_without_swaps_leave_their_price() -> None:
    samples = varied(200)
    before = samples.fit()
    rng = random.Random(1)
    for tokens in [1, 8, 64, 128] * (WINDOW_STEPS // 4):
        samples.add(*step(tokens, tokens + rng.randrange(4000)))
    after = samples.fit()
    assert after.swap_bytes_per_s == before.swap_bytes_per_s > 0
    assert after.token_ns == pytest.approx(TOKEN_NS, rel=0.01)


def test_a_fit_without_a_price_of_tokens_is_none() -> None:
    """More tokens in less time: the least squares under the limits make them free."""
    samples = varied(WINDOW_STEPS)
    before = samples.fit()
    for tokens in [1, 128] * (WINDOW_STEPS // 2):
        plan, batch, _ = step(tokens, 200)
        samples.add(plan, batch, 10_000_000 // tokens)
    assert samples.fit() == before


def test_one_slow_step_moves_little() -> None:
    samples = varied(200)
    plan, batch, step_ns = step(8, 500)
    samples.add(plan, batch, 1000 * step_ns)
    assert samples.fit().token_ns == pytest.approx(TOKEN_NS, rel=0.1)


def test_no_price_is_negative() -> None:
    rng = random.Random(3)
    samples = StepSamples(INFO)
    for _ in range(100):
        plan, batch, _ = step(rng.choice([1, 100]), 200)
        samples.add(plan, batch, rng.randrange(1_000, 1_000_000))
    model = samples.fit()
    prices = (model.step_ns, model.token_ns, model.kv_bytes_per_s, model.swap_bytes_per_s)
    assert min(*prices, model.pair_ns) >= 0


def test_empty_batches_say_nothing() -> None:
    samples = varied(MIN_STEPS - 1)
    plan, batch, _ = step(1, 1)
    samples.add(plan, batch, 0)
    assert samples.fit() == pb.CostModel()


def test_a_measured_swap_rate_counts() -> None:
    samples = StepSamples(dataclasses.replace(INFO, swap_bytes_per_s=5e10))
    assert samples.fit() == pb.CostModel(swap_bytes_per_s=5e10)
    for tokens in [1, 8, 64, 128] * MIN_STEPS:
        samples.add(*step(tokens, 2 * tokens))
    assert samples.fit().swap_bytes_per_s == 5e10

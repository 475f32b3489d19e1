from __future__ import annotations

import numpy as np
import pytest

from benchmarks.workloads import (
    CONVERSATION_OUTPUT,
    CONVERSATION_PROMPT,
    Knots,
    conversation,
    equal,
    sample_lengths,
)


@pytest.mark.parametrize(
    ("knots", "mean", "quantiles"),
    [
        (CONVERSATION_PROMPT, 1154.7, (1020, 4083, 4142)),
        (CONVERSATION_OUTPUT, 211.1, (129, 451, 601)),
    ],
)
def test_lengths_have_the_statistics_of_the_trace(
    knots: Knots, mean: float, quantiles: tuple[float, ...]
) -> None:
    lengths = sample_lengths(knots, 100_000, np.random.default_rng(5))
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    assert np.percentile(lengths, (50, 95, 99)) == pytest.approx(quantiles, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_draw_is_as_good(seed: int) -> None:
    lengths = sample_lengths(CONVERSATION_OUTPUT, 64, np.random.default_rng(seed))
    assert lengths.mean() == pytest.approx(211.1, rel=0.05)
    assert len(set(lengths.tolist())) > 40


def test_divided_lengths_stay_positive() -> None:
    lengths = sample_lengths(CONVERSATION_PROMPT, 1000, np.random.default_rng(1), divisor=1000)
    assert lengths.min() == 1


def test_conversation_is_seeded_and_within_the_vocabulary() -> None:
    first = conversation(64, 1000, prompt_divisor=8, output_divisor=2)
    assert first == conversation(64, 1000, prompt_divisor=8, output_divisor=2)
    assert first != conversation(64, 1000, prompt_divisor=8, output_divisor=2, seed=9)
    ids = {token_id for work in first for token_id in work.token_ids}
    assert min(ids) >= 100
    assert max(ids) < 1000


def test_equal_requests_differ_in_content_only() -> None:
    works = equal(8, 1000, num_prompt_tokens=128, num_output_tokens=3)
    assert {(len(work.token_ids), work.num_output_tokens) for work in works} == {(128, 3)}
    assert len({tuple(work.token_ids) for work in works}) == 8

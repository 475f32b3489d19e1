"""Sampling against float64 references, transformers' warpers and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.generation import logits_process

from executor_svc.runner import IntArray
from executor_svc.sampler import Penalties, Samples, SamplingParams, apply_penalties, sample
from executor_svc.tests import sampling_reference as reference

Logits = npt.NDArray[np.float32]
VOCAB = 1003  # no multiple of 4, nor of a vector

# Counter, key, result; the known-answer vectors published with the Random123 library.
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def params(count: int, **columns: Any) -> SamplingParams:
    """Columns [count], each given as a value, a sequence or nothing."""
    types = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.uint32),
        "top_p": (0.0, np.float32),
        "min_p": (0.0, np.float32),
        "seeds": (7, np.uint64),
        "branches": (0, np.uint32),
        "num_candidates": (0, np.uint32),
    }
    assert columns.keys() <= types.keys()
    values = {
        name: np.broadcast_to(np.asarray(columns.get(name, default), dtype), count).copy()
        for name, (default, dtype) in types.items()
    }
    return SamplingParams(**values)


def positions(count: int, first: int = 5) -> IntArray:
    return np.arange(first, first + count, dtype=np.int32)


def draw(logits: Logits, first_position: int = 5, **columns: Any) -> Samples:
    count = len(logits)
    return sample(logits, params(count, **columns), positions(count, first_position), 2)


def random_logits(count: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Logits:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, vocab)) * spread).astype(np.float32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = reference.compiled_philox(*(np.uint64(value) for value in (*counter, *key)))
    assert tuple(int(word) for word in words) == answer
    assert tuple(reference.philox_words(counter, key)) == answer


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB + 5},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 4.0},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("chosen", FILTERS)
def test_tokens_equal_the_reference(chosen: dict[str, float]) -> None:
    logits = random_logits(12, seed=1)
    seeds = np.arange(12, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    result = draw(logits, 100, seeds=seeds, branches=np.arange(12), **chosen)
    for row in range(12):
        keep = reference.kept(
            logits[row],
            np.float32(chosen.get("temperature", 1.0)).item(),
            int(chosen.get("top_k", 0)),
            np.float32(chosen.get("top_p", 0.0)).item(),
            np.float32(chosen.get("min_p", 0.0)).item(),
        )
        expected = reference.draw(
            logits[row],
            keep,
            np.float32(chosen.get("temperature", 1.0)).item(),
            100 + row,
            row,
            int(seeds[row]),
        )
        assert result.token_ids[row] == expected
    assert not result.is_failed.any()


def reachable(logits: Logits, draws: int = 4000, **chosen: Any) -> set[int]:
    rows = np.repeat(logits[None], draws, axis=0)
    return set(draw(rows, **chosen).token_ids.tolist())


def test_filters_keep_what_transformers_keeps() -> None:
    logits = random_logits(1, 37, 1.0, seed=2)[0]
    warpers = [
        logits_process.TemperatureLogitsWarper(1.5),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.2),
    ]
    scores = torch.from_numpy(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    expected = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    assert 2 < len(expected) < 20
    assert reachable(logits, temperature=1.5, top_k=20, top_p=0.9, min_p=0.2) == expected


def test_ties_at_the_threshold_are_all_kept() -> None:
    logits = np.full(40, -5.0, np.float32)
    logits[[3, 17, 29, 38]] = [2.0, 1.0, 1.0, 1.0]
    assert reachable(logits, top_k=2) == {3, 17, 29, 38}
    assert reachable(logits, top_p=0.5) == {3, 17, 29, 38}


def test_a_flat_distribution_survives_every_filter() -> None:
    logits = np.zeros(64, np.float32)
    assert reachable(logits, top_k=3, top_p=0.1, min_p=0.99) == set(range(64))


def test_frequencies_follow_the_probabilities() -> None:
    """Chi-square over 200,000 draws; 99.9 % quantile of 31 degrees of freedom is 61.1."""
    logits = random_logits(1, 32, 1.0, seed=4)[0]
    draws = 200_000
    rows = np.broadcast_to(logits, (draws, 32))
    tokens = draw(np.ascontiguousarray(rows), temperature=0.8).token_ids
    weights = np.exp(logits.astype(np.float64) / 0.8)
    expected = draws * weights / weights.sum()
    observed = np.bincount(tokens, minlength=32)
    assert ((observed - expected) ** 2 / expected).sum() < 61.1


def test_streams_of_seeds_branches_and_positions_differ() -> None:
    rows = np.zeros((64, VOCAB), np.float32)
    by_position = draw(rows).token_ids
    by_seed = sample(rows, params(64, seeds=np.arange(64)), np.full(64, 5, np.int32), 2).token_ids
    by_branch = sample(
        rows, params(64, branches=np.arange(64)), np.full(64, 5, np.int32), 2
    ).token_ids
    high_seed = sample(
        rows, params(64, seeds=np.arange(64) << 32), np.full(64, 5, np.int32), 2
    ).token_ids
    for tokens in (by_position, by_seed, by_branch, high_seed):
        assert np.unique(tokens).size > 50


def test_a_token_depends_on_its_row_alone() -> None:
    logits = random_logits(9, seed=5)
    columns: dict[str, Any] = {
        "top_p": [0.0, 0.9, 0.5] * 3,
        "top_k": [0, 0, 30] * 3,
        "seeds": np.arange(9),
    }
    together = draw(logits, **columns).token_ids
    order = np.random.default_rng(0).permutation(9)
    shuffled = sample(
        logits[order],
        params(9, **{name: np.asarray(values)[order] for name, values in columns.items()}),
        positions(9)[order],
        1,
    )
    assert shuffled.token_ids.tolist() == together[order].tolist()


def test_greedy_takes_the_lowest_id_of_the_highest() -> None:
    logits = random_logits(3)
    logits[0, [900, 20, 1002]] = 50.0
    logits[1, 1002] = 50.0
    tokens = draw(logits, temperature=0.0, top_k=5).token_ids
    assert tokens.tolist() == [20, 1002, int(logits[2].argmax())]


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-7, 1e-20])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 9, "top_p": 0.5}]
)
def test_a_tiny_temperature_leaves_the_highest(temperature: float, filters: dict[str, Any]) -> None:
    logits = random_logits(5)
    logits[1] -= 100  # all are negative
    logits[2] -= logits[2].max()
    logits[3, 7] = 30000.0
    logits[4, [5, 300]] = 12.0
    result = draw(logits, temperature=temperature, **filters)
    assert not result.is_failed.any()
    assert result.token_ids[:4].tolist() == logits[:4].argmax(axis=1).tolist()
    assert result.token_ids[4] in (5, 300)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 500, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_fail_alone(value: float, at: int, temperature: float) -> None:
    logits = random_logits(3)
    expected = draw(logits, temperature=temperature, num_candidates=2)
    logits[1, at] = value
    result = draw(logits, temperature=temperature, num_candidates=2)
    assert result.is_failed.tolist() == [False, True, False]
    assert result.token_ids.tolist() == [expected.token_ids[0], 0, expected.token_ids[2]]
    assert result.candidate_token_ids[[0, 1, 4, 5]].tolist() == (
        expected.candidate_token_ids[[0, 1, 4, 5]].tolist()
    )


def test_extreme_logits_stay_finite() -> None:
    logits = np.full((2, VOCAB), -3e38, np.float32)
    logits[:, 77] = 3e38
    assert draw(logits).token_ids.tolist() == [77, 77]
    assert draw(logits, top_p=0.9, top_k=7).token_ids.tolist() == [77, 77]
    assert draw(logits * 0).is_failed.tolist() == [False, False]


def test_candidates_are_the_likeliest_with_their_log_probabilities() -> None:
    logits = random_logits(3, seed=6)
    logits[2, 40:60] = logits[2].max() + 1
    result = draw(logits, temperature=0.5, num_candidates=[4, 0, 64])
    assert result.candidate_token_ids.shape == result.candidate_logprobs.shape == (68,)
    begin = 0
    for row, count, index in ((0, 4, 0), (2, 64, 1)):
        logprobs = reference.log_softmax(logits[row])
        order = np.lexsort((np.arange(VOCAB), -logits[row]))[:count]
        assert result.candidate_token_ids[begin : begin + count].tolist() == order.tolist()
        np.testing.assert_allclose(
            result.candidate_logprobs[begin : begin + count], logprobs[order], atol=1e-5
        )
        np.testing.assert_allclose(
            result.token_logprobs[index], logprobs[result.token_ids[row]], atol=1e-5
        )
        begin += count


def test_penalties_follow_their_definitions() -> None:
    logits = random_logits(2, 50, seed=8)
    before = logits.copy()
    history = np.array([3, 9, 3, 9, 9, 12], np.uint32)
    apply_penalties(logits, [Penalties(1, history, 2, 1.5, 0.25, 0.5)])
    scores = torch.from_numpy(before[1:])
    warper = logits_process.RepetitionPenaltyLogitsProcessor(1.5)
    expected = warper(torch.from_numpy(history.astype(np.int64))[None], scores.clone())[0].numpy()
    for token, count in ((3, 1), (9, 2), (12, 1)):
        expected[token] -= 0.25 + 0.5 * count
    np.testing.assert_array_equal(logits[0], before[0])
    np.testing.assert_allclose(logits[1], expected, rtol=1e-6)


def test_no_rows_give_no_tokens() -> None:
    result = draw(np.empty((0, VOCAB), np.float32))
    assert result.token_ids.size == result.candidate_token_ids.size == 0

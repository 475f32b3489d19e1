"""Request lengths and random prompts. Token ids are random: they change no timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Knots = tuple[tuple[float, float], ...]
"""(cumulative probability, tokens), both ascending: an inverse distribution function."""

# A public trace of one hour of conversation traffic (AzurePublicDataset, LLM inference, 2023),
# 19,366 requests: prompt tokens mean 1154.7, p50 1020, p95 4083, p99 4142; output tokens mean
# 211.1, p50 129, p95 451, p99 601, max 1000. Lengths of the two are all but uncorrelated (-0.11).
CONVERSATION_PROMPT: Final[Knots] = (
    *((0.0, 2), (0.01, 29), (0.05, 181), (0.1, 207), (0.2, 387), (0.35, 414), (0.4, 703)),
    *((0.45, 984), (0.5, 1020), (0.6, 1071), (0.7, 1130), (0.8, 1315), (0.85, 1876)),
    *((0.9, 2734), (0.92, 4073), (0.95, 4083), (0.99, 4142), (0.999, 4200), (1.0, 14050)),
)
CONVERSATION_OUTPUT: Final[Knots] = (
    *((0.0, 7), (0.01, 16), (0.05, 41), (0.1, 54), (0.2, 77), (0.3, 91), (0.4, 103)),
    *((0.5, 129), (0.6, 177), (0.65, 217), (0.66, 237), (0.67, 371), (0.75, 395), (0.8, 400)),
    *((0.85, 411), (0.9, 424), (0.95, 451), (0.97, 470), (0.99, 601), (1.0, 1000)),
)

_FIRST_ORDINARY_ID: Final = 100
"""Vocabularies tend to begin with their special tokens."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request: a tokenised prompt, and how many tokens to generate for it."""

    token_ids: list[int]
    num_output_tokens: int


def sample_lengths(
    knots: Knots, count: int, rng: np.random.Generator, divisor: int = 1
) -> npt.NDArray[np.int64]:
    """Draw `count` lengths, one from each of `count` equal slices of probability, shuffled.

    So even a small draw has the distribution's statistics. Lengths are divided by `divisor`,
    and at least 1. Returns [count].
    """
    probabilities, tokens = np.array(knots).T
    slices = (rng.permutation(count) + rng.random(count)) / count
    lengths: npt.NDArray[np.float64] = np.interp(slices, probabilities, tokens) / divisor
    return np.rint(lengths).astype(np.int64).clip(min=1)


def random_prompt(num_tokens: int, vocab_size: int, rng: np.random.Generator) -> list[int]:
    """Ordinary token ids [num_tokens]."""
    return list(map(int, rng.integers(_FIRST_ORDINARY_ID, vocab_size, num_tokens)))


def conversation(
    count: int, vocab_size: int, *, prompt_divisor: int, output_divisor: int, seed: int = 1
) -> list[Work]:
    """Ragged requests with the statistics of conversation traffic, lengths divided."""
    rng = np.random.default_rng(seed)
    prompts = sample_lengths(CONVERSATION_PROMPT, count, rng, prompt_divisor)
    outputs = sample_lengths(CONVERSATION_OUTPUT, count, rng, output_divisor)
    return [
        Work(random_prompt(int(num_prompt), vocab_size, rng), int(num_output))
        for num_prompt, num_output in zip(prompts, outputs, strict=True)
    ]


def equal(
    count: int, vocab_size: int, *, num_prompt_tokens: int, num_output_tokens: int, seed: int = 2
) -> list[Work]:
    """Requests of one size, with different prompts."""
    rng = np.random.default_rng(seed)
    return [
        Work(random_prompt(num_prompt_tokens, vocab_size, rng), num_output_tokens)
        for _ in range(count)
    ]

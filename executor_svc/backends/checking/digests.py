"""What the content-checking executor stores as KV and how it makes tokens of it.

The one place that both the fake runner, which goes through blocks, and the reference, which has
none, take these from. All arithmetic is on uint64 and wraps.

    digest(token, position)   what a KV slot holds
    context                   sum over positions p of digest_p * weight(p): depends on every
                              digest and on where it was found
    next token                a function of the context and, when sampling, of seed, branch and
                              every sampling parameter
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

U64Array = npt.NDArray[np.uint64]

POISON: Final = np.uint64(0xBADB10C5_BADB10C5)
"""What a slot holds that was never written in this epoch."""

_TOKEN_SALT: Final = np.uint64(0x9E3779B97F4A7C15)
_POSITION_SALT: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_WEIGHT_SALT: Final = np.uint64(0x165667B19E3779F9)
_CANDIDATE_STEP: Final = 0.25


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, one array entry per sample; temperature 0 is greedy."""

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.uint32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: U64Array
    branches: npt.NDArray[np.uint32]


def mix(values: U64Array) -> U64Array:
    """Scramble each value: a bijection whose output bits depend on all input bits (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def token_digests(
    token_ids: npt.NDArray[np.integer[Any]], positions: npt.NDArray[np.integer[Any]]
) -> U64Array:
    """KV of the tokens [n] at the positions [n]."""
    tokens, places = token_ids.astype(np.uint64), positions.astype(np.uint64)
    return mix((tokens + np.uint64(1)) * _TOKEN_SALT + places * _POSITION_SALT)


def position_weights(positions: npt.NDArray[np.integer[Any]]) -> U64Array:
    """Odd factors [n] that tie a digest to the position it was read at."""
    return mix(positions.astype(np.uint64) + _WEIGHT_SALT) | np.uint64(1)


def next_tokens(contexts: U64Array, sampling: Sampling, vocab_size: int) -> npt.NDArray[np.int32]:
    """The tokens [n] that follow the contexts [n]."""
    is_greedy = sampling.temperature == 0
    keys = np.where(is_greedy, np.uint64(0), _sampling_keys(sampling))
    return (mix(contexts ^ keys) % np.uint64(vocab_size)).astype(np.int32)


def position_contexts(positions: npt.NDArray[np.integer[Any]], seeds: U64Array) -> U64Array:
    """Contexts [n] of the mode that keeps no KV: seed and position stand for the content."""
    return mix(seeds + positions.astype(np.uint64) * _POSITION_SALT)


def candidates(
    context: np.uint64, num_candidates: int, vocab_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The likeliest tokens after `context`, best first, with log-probabilities; the first one is
    the greedy token. Both [min(num_candidates, vocab_size)].
    """
    ranks = np.arange(min(num_candidates, vocab_size), dtype=np.uint64)
    best = mix(np.array([context])) % np.uint64(vocab_size)
    return ((best + ranks) % np.uint64(vocab_size)).astype(np.int32), _logprobs(context, ranks)


def token_logprob(context: np.uint64, token_id: int, vocab_size: int) -> np.float32:
    """Log-probability of any token after `context`; agrees with `candidates`."""
    best = int(mix(np.array([context]))[0]) % vocab_size
    rank = np.array([(token_id - best) % vocab_size], np.uint64)
    return np.float32(_logprobs(context, rank)[0])


def _logprobs(context: np.uint64, ranks: U64Array) -> npt.NDArray[np.float32]:
    """Strictly falling with the rank, with gaps that depend on the context."""
    noise = (mix(context + ranks * _WEIGHT_SALT) >> np.uint64(40)) / np.float64(1 << 24)
    return (-_CANDIDATE_STEP * (ranks + noise * 0.9 + 0.05)).astype(np.float32)


def _sampling_keys(sampling: Sampling) -> U64Array:
    keys = mix(sampling.seeds + _TOKEN_SALT)
    columns = (sampling.branches, sampling.top_k)
    bits = (sampling.temperature, sampling.top_p, sampling.min_p)
    for column in (*columns, *(values.view(np.uint32) for values in bits)):
        keys = mix(keys + column.astype(np.uint64) + _WEIGHT_SALT)
    return keys

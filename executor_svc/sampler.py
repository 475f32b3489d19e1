"""Sampling: stateless, so that any step can be replayed with the same result.

Order: penalties, temperature, top-k, top-p (of what top-k left), min-p, draw. All filters keep
ties. The draw is Gumbel-max: the token with the highest logit / temperature + g, where
g = -log(-log(u)), u = (w + 1/2) / 2**32 and w is word (id % 4) of

    Philox4x32-10(counter = (id // 4, position, branch, 0), key = (seed low, seed high))

for the vocabulary id and the absolute position of the token to be sampled. A token thus depends
on its row's logits, parameters and position alone: not on the batch, the step or the row number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from executor_svc.backends.cpu import sampling
from executor_svc.backends.cpu.simd import FloatArray
from executor_svc.runner import IntArray


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of the rows that sample, parallel columns [n]; zeros switch filters off."""

    temperature: FloatArray
    top_k: npt.NDArray[np.uint32]
    top_p: FloatArray
    min_p: FloatArray
    seeds: npt.NDArray[np.uint64]
    branches: npt.NDArray[np.uint32]
    num_candidates: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of one row over its history."""

    index: int
    """Which row of logits."""
    history: npt.NDArray[np.uint32]  # [position of the token to be sampled]
    num_prompt_tokens: int
    repetition: float  # 1: off
    presence: float
    frequency: float


@dataclass(frozen=True, slots=True)
class Samples:
    """One token for each row of logits; the candidate columns as in StepOutputs."""

    token_ids: IntArray  # [n]
    is_failed: npt.NDArray[np.bool_]  # [n], NaN or Inf among the logits
    candidate_token_ids: IntArray
    candidate_logprobs: FloatArray
    token_logprobs: FloatArray


def apply_penalties(logits: FloatArray, penalties: list[Penalties]) -> None:
    """Change logits [n, vocab_size] in place."""
    for row in penalties:
        sampling.penalise(
            logits[row.index],
            row.history,
            row.num_prompt_tokens,
            np.float32(row.repetition),
            np.float32(row.presence),
            np.float32(row.frequency),
        )


def sample(
    logits: FloatArray, params: SamplingParams, positions: IntArray, num_threads: int
) -> Samples:
    """Draw one token for each row.

    Args:
        logits: [n, vocab_size] float32, after penalties; not changed.
        params: per row.
        positions: [n], absolute position of the token to be sampled.
        num_threads: threads to use.
    """
    count = len(logits)
    token_ids = np.empty(count, np.int32)
    status = np.empty(count, np.int32)
    filters = np.stack([params.top_k, params.top_p, params.min_p], axis=1, dtype=np.float64)
    sampling.draw(
        logits,
        params.temperature,
        filters,
        params.seeds,
        params.branches,
        positions,
        min(num_threads, max(count, 1)),
        token_ids,
        status,
    )
    asked = np.flatnonzero(params.num_candidates)
    num_candidates = params.num_candidates[asked].astype(np.int64)
    ends = np.cumsum(num_candidates)
    candidate_token_ids = np.zeros(int(num_candidates.sum()), np.int32)
    candidate_logprobs = np.zeros(candidate_token_ids.size, np.float32)
    token_logprobs = np.zeros(asked.size, np.float32)
    if asked.size:
        sampling.rank(
            logits,
            asked,
            token_ids,
            status,
            ends,
            min(num_threads, asked.size),
            candidate_token_ids,
            candidate_logprobs,
            token_logprobs,
        )
    return Samples(
        token_ids=token_ids,
        is_failed=status != sampling.IS_SAMPLED,
        candidate_token_ids=candidate_token_ids,
        candidate_logprobs=candidate_logprobs,
        token_logprobs=token_logprobs,
    )

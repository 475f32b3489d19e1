"""The answers that the content-checking executor must give, without blocks, rows or steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from executor_svc.backends.checking.digests import (
    Sampling,
    U64Array,
    next_tokens,
    position_contexts,
    position_weights,
    token_digests,
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One branch's sampling; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    seed: int = 0
    branch: int = 0

    def columns(self) -> Sampling:
        """As arrays of one entry."""
        return Sampling(
            temperature=np.array([self.temperature], np.float32),
            top_k=np.array([self.top_k], np.uint32),
            top_p=np.array([self.top_p], np.float32),
            min_p=np.array([self.min_p], np.float32),
            seeds=np.array([self.seed], np.uint64),
            branches=np.array([self.branch], np.uint32),
        )


def context_of(token_ids: Sequence[int]) -> U64Array:
    """Context [1] after the whole sequence."""
    positions = np.arange(len(token_ids))
    digests = token_digests(np.array(token_ids, np.int64), positions)
    context: U64Array = (digests * position_weights(positions)).sum(keepdims=True)
    return context


def reference_output(
    prompt_ids: Sequence[int],
    n_tokens: int,
    vocab_size: int,
    sampling: SamplingParams | None = None,
    *,
    stop_token_ids: Collection[int] = (),
    check_content: bool = True,
) -> list[int]:
    """Output ids, at most n_tokens; a stop token ends the output and is its last id.

    Args:
        prompt_ids: at least one.
        n_tokens: most output tokens.
        vocab_size: as given to the fake runner.
        sampling: None is greedy.
        stop_token_ids: ids that end the output.
        check_content: as given to the fake runner.
    """
    columns = (sampling or SamplingParams()).columns()
    context = context_of(prompt_ids)
    output: list[int] = []
    while len(output) < n_tokens and not (output and output[-1] in stop_token_ids):
        position = np.array([len(prompt_ids) + len(output)])
        if not check_content:
            context = position_contexts(position, columns.seeds)
        token = next_tokens(context, columns, vocab_size)
        output.append(int(token[0]))
        context = context + token_digests(token, position) * position_weights(position)
    return output

"""Beam search on the content-checking model, without blocks, rows or steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from executor_svc.backends.checking.digests import (
    candidates,
    position_weights,
    token_digests,
    token_logprob,
)
from integration_tests.reference import context_of
from scheduler_svc.beam import BeamParams, BeamSearch, Hypothesis
from scheduler_svc.request import TokenIds


def reference_beams(
    prompt_ids: Sequence[int],
    n_tokens: int,
    vocab_size: int,
    params: BeamParams,
    stop_token_ids: frozenset[int],
    is_text_stopped: Callable[[TokenIds], bool] | None = None,
) -> list[Hypothesis]:
    """The hypotheses returned, best first; at most n_tokens output tokens each."""
    num_prompt = len(prompt_ids)
    search = BeamSearch(params, num_prompt, num_prompt + n_tokens, stop_token_ids, is_text_stopped)
    width = params.num_candidates(len(stop_token_ids), has_stop_strings=is_text_stopped is not None)
    contexts = context_of(prompt_ids)  # [num_beams]
    while True:
        found = [candidates(context, width, vocab_size) for context in contexts]
        parents = search.advance([ids for ids, _ in found], [probs for _, probs in found])
        if search.is_done:
            return search.results()
        position = np.full(len(parents), num_prompt + search.num_output_tokens - 1)
        digests = token_digests(search.last_token_ids, position) * position_weights(position)
        contexts = contexts[parents] + digests


def token_logprobs(
    prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> list[float]:
    """The log-probability of each output token after what stands before it."""
    context = context_of(prompt_ids)
    logprobs = []
    for index, token_id in enumerate(output_ids):
        logprobs.append(float(token_logprob(context[0], token_id, vocab_size)))
        position = np.array([len(prompt_ids) + index])
        context = context + token_digests(np.array([token_id]), position) * position_weights(
            position
        )
    return logprobs

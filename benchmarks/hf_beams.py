"""Beam search by transformers' own `generate`, and how close its choices were; runs in hf_worker.

A choice is close if the other way differs by less than a bound. Nudging one log-probability by that
much makes transformers choose the other way: its output then is what it would have been, had its
sums been rounded a little differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from transformers import LogitsProcessor, LogitsProcessorList

_MARGIN: Final = 5e-5
"""By how much a nudged choice wins: above the rounding of float32 sums of some hundred."""
_NUM_NEXT: Final = 4
"""Losers looked at for each choice."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """A change of one log-probability, that of `token_id` after these output tokens."""

    output_ids: list[int]
    token_id: int
    by: float


@dataclass(frozen=True, slots=True)
class _Continuation:
    total: float
    output_ids: list[int]
    token_id: int
    is_stop: bool

    def nudge(self, by: float) -> Nudge:
        return Nudge(self.output_ids, self.token_id, by)


class Nudging(LogitsProcessor):
    """Applies nudges, and notes which others would change a choice that is closer than `bound`."""

    def __init__(
        self, num_prompt_tokens: int, stop_ids: list[int], bound: float, nudges: list[Nudge]
    ) -> None:
        self.close: list[Nudge] = []
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_ids = stop_ids
        self._bound = bound
        self._nudges = nudges
        self._totals: dict[tuple[int, ...], float] = {(): 0.0}  # of the beams, by output tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [num_beams, vocab_size] of the step, nudged."""
        outputs: list[list[int]] = input_ids[:, self._num_prompt_tokens :].tolist()
        for nudge in self._nudges:
            for beam, output in enumerate(outputs):
                if output == nudge.output_ids:
                    scores[beam, nudge.token_id] += nudge.by
        # In the first step all beams are the same one.
        num_different = len(outputs) if outputs[0] else 1
        totals = torch.tensor([self._totals[tuple(output)] for output in outputs[:num_different]])
        joint = (scores[:num_different] + totals[:, None]).flatten()
        num_wanted = max(2, 1 + len(self._stop_ids)) * len(outputs) + _NUM_NEXT
        values, indices = joint.topk(num_wanted)
        best = []
        for total, index in zip(values.tolist(), indices.tolist(), strict=True):
            beam, token_id = divmod(index, scores.shape[-1])
            is_stop = token_id in self._stop_ids
            best.append(_Continuation(total, outputs[beam], token_id, is_stop))
        self.close += self._close(best, len(outputs))
        self._totals = {(*each.output_ids, each.token_id): each.total for each in best}
        return scores

    def _close(self, best: list[_Continuation], width: int) -> Iterator[Nudge]:
        live = [each for each in best if not each.is_stop]
        last = live[width - 1]
        for each in live[width : width + _NUM_NEXT]:
            if last.total - each.total < self._bound:
                yield each.nudge(last.total - each.total + _MARGIN)
        for rank, each in enumerate(best):
            if each.is_stop:
                other = best[width if rank < width else width - 1]
                gap = other.total - each.total
                if abs(gap) < self._bound:
                    yield each.nudge(gap - _MARGIN if rank < width else gap + _MARGIN)


def beam_search(
    model: Any,
    token_ids: list[int],
    options: dict[str, Any],
    bound: float | None,
    nudges: list[dict[str, Any]],
) -> dict[str, Any]:
    """All `num_beams` outputs, stop token included, and their scores; close choices if `bound`.

    Args:
        model: a causal language model with its generation config.
        token_ids: the prompt.
        options: num_beams, length_penalty, early_stopping and max_new_tokens of `generate`.
        bound: of log-probabilities; None: `generate` alone, without a look at its choices.
        nudges: each the fields of a Nudge; only with a bound.
    """
    eos = model.generation_config.eos_token_id
    stop_ids = eos if isinstance(eos, list) else [eos]
    prompt = torch.tensor([token_ids])
    noting = None
    if bound is not None:
        noting = Nudging(len(token_ids), stop_ids, bound, [Nudge(**each) for each in nudges])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_return_sequences=options["num_beams"],
        pad_token_id=stop_ids[0],
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=LogitsProcessorList([noting] if noting else []),
        **options,
    )
    sequences = output.sequences[:, len(token_ids) :].tolist()
    return {
        "sequences": [_until_stop(sequence, stop_ids) for sequence in sequences],
        "scores": output.sequences_scores.tolist(),
        "close": [asdict(nudge) for nudge in noting.close] if noting else [],
    }


def _until_stop(sequence: list[int], stop_ids: list[int]) -> list[int]:
    """Without what pads it behind its stop token."""
    ends = [index for index, token_id in enumerate(sequence) if token_id in stop_ids]
    return sequence[: ends[0] + 1] if ends else sequence

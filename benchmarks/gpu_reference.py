"""Transformers in this process, as the models' own word: what is greedy, and what is a near tie.

It is held twice: in bfloat16, as the GPU serves, and in float32. At one position the two differ by
at most a `noise` over all logits. Two tokens are a near tie where their float32 logits differ by
less than twice that: each may be off by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.hf_reference import Reference, groups
from benchmarks.hf_worker import Worker
from benchmarks.prompts import Prompt

_TIE_FACTOR: Final = 2


@dataclass(frozen=True, slots=True)
class Parting:
    """Where an output first leaves the reference, and whether what follows is still greedy."""

    prompt: str
    position: int
    expected_id: int
    got_id: int
    gap: float  # between their float32 logits
    noise: float  # at this position
    num_far_tokens: int  # later tokens of the output that are no near tie with the likeliest

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding to bfloat16 may decide between the two."""
        return self.gap < _TIE_FACTOR * self.noise


class Transformers:
    """Both models on one device, which needs about 6 bytes a parameter."""

    def __init__(self, model_path: Path, device: str) -> None:
        """Load them. On the CPU the system serves float32, so that is what is greedy there."""
        self._exact = Worker(str(model_path), torch.float32, device)
        self._rounded = Worker(str(model_path), torch.bfloat16, device)
        self._served = self._rounded if device == "cuda" else self._exact

    def tokenize(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of each prompt."""
        ids: list[list[int]] = self._exact.tokenize([p.input for p in prompts])["token_ids"]
        return ids

    @torch.inference_mode()
    def references(
        self,
        prompts: Sequence[Prompt],
        num_output_tokens: int,
        progress: Callable[[int], object] = lambda _count: None,
    ) -> list[Reference]:
        """Greedy outputs at batch 1, in the type that is served; nothing ends them early.

        Args:
            prompts: in this order.
            num_output_tokens: of each.
            progress: told how many more are done.
        """
        token_ids = self.tokenize(prompts)
        outputs: dict[int, list[int]] = {}
        for group in groups(token_ids):
            answer = self._served.greedy([token_ids[i] for i in group], num_output_tokens)
            outputs |= zip(group, answer["token_ids"], strict=True)
            progress(len(group))
        return [
            Reference(prompt.name, ids, outputs[index])
            for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True))
        ]

    @torch.inference_mode()
    def judge(self, reference: Reference, output_ids: list[int]) -> Parting:
        """Of an output that is not the reference's: see `judge`."""
        sequence = [reference.prompt_ids + output_ids]
        exact, rounded = (
            worker.logits(sequence, len(output_ids) + 1)[0, :-1].float()
            for worker in (self._exact, self._rounded)
        )
        return judge(reference, output_ids, exact, rounded)

    @torch.inference_mode()
    def next_logprobs(self, token_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each token but the first after those before it.

        Returns float32 [n - 1] on the CPU, of the float32 and of the bfloat16 model.
        """
        exact, rounded = (
            chosen(worker.logits([token_ids], len(token_ids))[0].float().log_softmax(-1), token_ids)
            for worker in (self._exact, self._rounded)
        )
        return exact, rounded


def judge(reference: Reference, output_ids: list[int], exact: Tensor, rounded: Tensor) -> Parting:
    """Say how an output differs from the reference.

    Args:
        reference: of the same prompt, another output of the same length.
        output_ids: [n].
        exact: float32 logits [n, vocab_size] of the positions of output_ids, given the tokens of
            output_ids before them.
        rounded: the same of the bfloat16 model.
    """
    pairs = enumerate(zip(reference.output_ids, output_ids, strict=True))
    position = next(index for index, (expected, got) in pairs if expected != got)
    expected_id, got_id = reference.output_ids[position], output_ids[position]
    noise = (exact - rounded).abs().amax(-1)
    gaps = exact.amax(-1) - chosen(exact, [-1, *output_ids])
    is_far = gaps >= _TIE_FACTOR * noise
    return Parting(
        reference.name,
        position,
        expected_id,
        got_id,
        gap=float((exact[position, expected_id] - exact[position, got_id]).abs()),
        noise=float(noise[position]),
        num_far_tokens=int(is_far[position + 1 :].sum()),
    )


def chosen(values: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Of values [>= n - 1, vocab_size] those of the token after each: [n - 1]."""
    after = torch.tensor(token_ids[1:], device=values.device)
    return values[: len(after)].gather(1, after[:, None])[:, 0]

"""What transformers says of a text, in float32, for a small random model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from executor_svc.tests.models import tiny_config, write_model

VOCAB = 104
# Times the mean error of transformers' own bfloat16 over a text; its largest is 6 times the mean.
# Two blocks exchanged change log-probabilities by 30 times as much.
NOISE_FACTOR = 10.0


@dataclass(frozen=True)
class Truth:
    """Log-probabilities [vocab_size] of one position, and how far off bfloat16 may be."""

    logprobs: np.ndarray
    tolerance: float


class Oracle:
    """Transformers' float32 instance of the same weights."""

    def __init__(self, path: Path) -> None:
        config = tiny_config(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=384,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
        )
        self._exact = write_model(path, config, matrix_spread=0.1)
        self._rounded: Any = copy.deepcopy(self._exact).bfloat16()

    def truths(self, tokens: Sequence[int]) -> list[Truth]:
        """For each position of a text."""
        exact, rounded = self._logprobs(self._exact, tokens), self._logprobs(self._rounded, tokens)
        error = float(np.abs(exact - rounded).mean())
        return [Truth(each, NOISE_FACTOR * error) for each in exact]

    def last(self, tokens: Sequence[int]) -> Truth:
        """For the last one."""
        return self.truths(tokens)[-1]

    def _logprobs(self, model: Any, tokens: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([list(tokens)])).logits[0]
        found: np.ndarray = logits.float().log_softmax(-1).numpy()
        return found

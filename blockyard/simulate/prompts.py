"""Token ids for prompts of which a trace gives only lengths and block ids."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.simulate.trace import TRACE_BLOCK_TOKENS, Trace
from scheduler_svc.request import TokenIds

_SEED: Final = 20231116
# Multipliers of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014), as published by Vigna.
_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


class Prompts:
    """Makes the prompt of each request when it is asked for; the same one every time."""

    def __init__(self, trace: Trace, vocab_size: int, seed: int = 0) -> None:
        """Prompts of `trace` with ids 0 to vocab_size - 1; other ones for every `seed`, at least 0.

        With block ids, seeds above 2**16 repeat.
        """
        self._trace = trace
        self._first_place = np.uint64((seed % (1 << 16)) << 48)
        self._vocab_size = vocab_size
        # Without block ids, prompt i is the stretch from i on of one random text: no two begin
        # alike, and a million prompts take no memory of their own.
        self._text: TokenIds = np.empty(0, np.int32)
        if trace.prefixes is None:
            num_tokens = len(trace) + int(trace.num_prompt_tokens.max())
            rng = np.random.default_rng(_SEED + seed)
            self._text = rng.integers(vocab_size, size=num_tokens, dtype=np.int32)
            self._text.flags.writeable = False

    def of(self, index: int) -> TokenIds:
        """The prompt of one request [num_prompt_tokens], read-only or new."""
        num_tokens = int(self._trace.num_prompt_tokens[index])
        if self._trace.prefixes is None:
            return self._text[index : index + num_tokens]
        ids = self._trace.prefixes.of(index).astype(np.uint64)
        offsets = np.arange(TRACE_BLOCK_TOKENS, dtype=np.uint64)
        places = self._first_place + ids[:, None] * np.uint64(TRACE_BLOCK_TOKENS) + offsets
        return (_mixed(places.ravel()[:num_tokens]) % np.uint64(self._vocab_size)).astype(np.int32)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function of each value [n]; overflow wraps."""
    mixed = values * _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))

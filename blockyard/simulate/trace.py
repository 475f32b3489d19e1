"""What requests arrive, when, how long they are, and which prompts begin alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

TRACE_BLOCK_TOKENS: Final = 512
"""Tokens that one id of `Prefixes` stands for."""

NS_PER_S: Final = 1_000_000_000

Times = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int32]


class TraceError(Exception):
    """A trace that cannot be read or replayed; the message says where."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Prompts as chained block ids: equal ids are equal blocks after equal prefixes."""

    ids: npt.NDArray[np.int64]  # [sum of blocks]
    starts: npt.NDArray[np.int64]  # [num_requests + 1], into ids

    def of(self, index: int) -> npt.NDArray[np.int64]:
        """The ids of one prompt [ceil(num_prompt_tokens / TRACE_BLOCK_TOKENS)]; a view."""
        return self.ids[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True, slots=True)
class Trace:
    """Columns over requests, in order of arrival. Without `prefixes` no two prompts are alike."""

    name: str
    arrival_ns: Times  # [num_requests], ascending
    num_prompt_tokens: Lengths  # [num_requests], at least 1
    num_output_tokens: Lengths  # [num_requests], at least 1
    prefixes: Prefixes | None = None

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def num_total_tokens(self) -> npt.NDArray[np.int64]:
        """Prompt and output of each request [num_requests]."""
        return self.num_prompt_tokens.astype(np.int64) + self.num_output_tokens

    def select(self, indexes: npt.NDArray[np.integer]) -> Trace:
        """These requests, in this order; arrivals must still ascend."""
        prefixes = self.prefixes
        if prefixes is not None:
            parts = [prefixes.of(index) for index in indexes.tolist()]
            counts = [len(part) for part in parts]
            starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            prefixes = Prefixes(np.concatenate([np.empty(0, np.int64), *parts]), starts)
        return replace(
            self,
            arrival_ns=self.arrival_ns[indexes],
            num_prompt_tokens=self.num_prompt_tokens[indexes],
            num_output_tokens=self.num_output_tokens[indexes],
            prefixes=prefixes,
        )

    def fitting(self, max_total_tokens: int) -> Trace:
        """The requests of at most this prompt + output."""
        return self.select(np.flatnonzero(self.num_total_tokens <= max_total_tokens))

    def take(self, count: int) -> Trace:
        """The first `count` requests, over and over if the trace has fewer.

        A repetition begins one mean gap after the last arrival, and shares no prompt with others.
        """
        assert count >= 1, count
        cycles, places = np.divmod(np.arange(count), len(self))
        taken = self.select(places)
        duration_ns = int(self.arrival_ns[-1] - self.arrival_ns[0])
        period_ns = duration_ns + duration_ns // max(1, len(self) - 1)
        prefixes = taken.prefixes
        if prefixes is not None and count > len(self):
            shifts = cycles * (int(prefixes.ids.max()) + 1)
            ids = prefixes.ids + np.repeat(shifts, np.diff(prefixes.starts))
            prefixes = replace(prefixes, ids=ids)
        return replace(taken, arrival_ns=taken.arrival_ns + cycles * period_ns, prefixes=prefixes)

    def at_rate(self, requests_per_s: float) -> Trace:
        """The same pattern of arrivals, stretched to this mean rate.

        Raises:
            TraceError: if all arrive at once, or the rate is not a positive number.
        """
        if not 0 < requests_per_s < float("inf"):
            raise TraceError(f"the rate must be positive, not {requests_per_s:g} requests/s")
        duration_ns = int(self.arrival_ns[-1] - self.arrival_ns[0])
        if not duration_ns:
            raise TraceError(f"{self.name}: all requests arrive at once; that has no rate to scale")
        scale = (len(self) - 1) / requests_per_s * NS_PER_S / duration_ns
        return replace(
            self, arrival_ns=((self.arrival_ns - self.arrival_ns[0]) * scale).astype(int)
        )

    def all_at_once(self) -> Trace:
        """Every request waits from time 0."""
        return replace(self, arrival_ns=np.zeros_like(self.arrival_ns))

    def ideal_hit_ratio(self) -> float:
        """Share of prompt tokens that an infinite cache has, if requests run one after another."""
        if self.prefixes is None:
            return 0.0
        seen: set[int] = set()
        num_hits = 0
        for index, num_tokens in enumerate(self.num_prompt_tokens.tolist()):
            ids = self.prefixes.of(index).tolist()
            num_known = next((i for i, block in enumerate(ids) if block not in seen), len(ids))
            num_hits += min(num_known * TRACE_BLOCK_TOKENS, num_tokens)
            seen.update(ids[num_known:])
        return num_hits / int(self.num_prompt_tokens.sum(dtype=np.int64))

"""Histograms that cost little to fill and can be added up over processes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class Exemplar(NamedTuple):
    """One observation whose trace can be looked up."""

    value: float
    trace_id: bytes  # W3C [16]
    unix_s: float


class Histogram:
    """Observations by bucket: of the values above the bound before, up to and with the own one."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty; `bounds` ascend, and one more bucket is beyond the last."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """The newest of each bucket that has one."""

    def observe(self, value: float, trace_id: bytes = b"") -> int:
        """Count a value; `trace_id` is that of a sampled request, or empty. Returns its bucket."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if trace_id:
            self.exemplars[bucket] = Exemplar(value, trace_id, time.time())
        return bucket

    def observe_times(self, value: float, count: int) -> None:
        """Count the same value so many times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def add(
        self, counts: Sequence[int], total: float, exemplars: dict[int, Exemplar] | None = None
    ) -> None:
        """Add what another histogram with the same bounds counted, whose sum is `total`.

        Raises ValueError if it cannot have the same bounds.
        """
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total
        self.exemplars.update(exemplars or {})

    def clear(self) -> None:
        """Start again."""
        self.counts = [0] * len(self.counts)
        self.sum = 0.0
        self.exemplars.clear()

"""Histograms that cost little to fill and can be added up over processes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

_MOST_LATER: Final = 512


class Exemplar(NamedTuple):
    """One observation whose trace can be looked up."""

    value: float
    trace_id: bytes  # W3C [16]
    unix_s: float


class Histogram:
    """Observations by bucket: of the values above the bound before, up to and with the own one."""

    __slots__ = ("_counts", "_later", "_sum", "bounds", "exemplars")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty; `bounds` ascend, and one more bucket is beyond the last."""
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._later: list[float] = []  # observed, not counted yet
        self.exemplars: dict[int, Exemplar] = {}
        """The newest of each bucket that has one."""

    @property
    def counts(self) -> list[int]:
        """Observations in each bucket [len(bounds) + 1]."""
        self._count_later()
        return self._counts

    @property
    def sum(self) -> float:
        """Of all values."""
        self._count_later()
        return self._sum

    def observe(self, value: float, trace_id: bytes = b"") -> int:
        """Count a value; `trace_id` is that of a sampled request, or empty. Returns its bucket."""
        bucket = bisect_left(self.bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if trace_id:
            self.exemplars[bucket] = Exemplar(value, trace_id, time.time())
        return bucket

    def observe_times(self, value: float, count: int) -> None:
        """Count the same value so many times."""
        self._counts[bisect_left(self.bounds, value)] += count
        self._sum += value * count

    def observe_later(self, value: float) -> None:
        """Count a value when somebody looks, or many wait: a third of the time of `observe`."""
        self._later.append(value)
        if len(self._later) >= _MOST_LATER:
            self._count_later()

    def _count_later(self) -> None:
        if self._later:
            buckets = np.searchsorted(self.bounds, self._later)
            counts = np.bincount(buckets, minlength=len(self._counts))
            self._sum += sum(self._later)
            self._counts = [a + b for a, b in zip(self._counts, counts.tolist(), strict=True)]
            self._later.clear()

    def add(
        self, counts: Sequence[int], total: float, exemplars: dict[int, Exemplar] | None = None
    ) -> None:
        """Add what another histogram with the same bounds counted, whose sum is `total`.

        Raises ValueError if it cannot have the same bounds.
        """
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._sum += total
        self.exemplars.update(exemplars or {})

    def clear(self) -> None:
        """Start again."""
        self._counts = [0] * len(self._counts)
        self._sum = 0.0
        self._later.clear()
        self.exemplars.clear()

"""When to send what a stream has: at once while that is cheap, merged under load.

A message costs a front end 50 to 90 us of CPU, however many tokens it carries. While messages at
the engine's own rate would use a small share of a core, and the event loop is not late, every
token is sent at once; otherwise a stream's tokens are merged over an interval that keeps the share
bounded. First tokens and ends are always sent at once.
"""

from __future__ import annotations

from typing import Final

MESSAGE_COST_S: Final = 80e-6
IMMEDIATE_SHARE: Final = 0.2
"""Of a core: below it, tokens are sent as they come."""
MERGED_SHARE: Final = 0.4
"""Of a core: what merging aims at."""
MIN_INTERVAL_S: Final = 0.020
MAX_INTERVAL_S: Final = 0.050
MAX_IMMEDIATE_LAG_S: Final = 0.010

_SMOOTHING: Final = 0.1
_MAX_GAP_S: Final = 1.0


class FlushPolicy:
    """Smoothed rate of the engine's batches and the interval that follows from it."""

    def __init__(self, max_interval_s: float = MAX_INTERVAL_S) -> None:
        """Merge over at most so long; 0: never."""
        self._max_interval_s = max_interval_s
        self._num_streams = 0.0
        self._gap_s = _MAX_GAP_S
        self._last_batch_s: float | None = None

    def observe(self, num_streams: int, now_s: float) -> None:
        """A batch with tokens for `num_streams` arrived at `now_s` (monotonic)."""
        if self._last_batch_s is not None:
            gap_s = min(now_s - self._last_batch_s, _MAX_GAP_S)
            self._gap_s += _SMOOTHING * (gap_s - self._gap_s)
        self._last_batch_s = now_s
        self._num_streams += _SMOOTHING * (num_streams - self._num_streams)

    def interval_s(self, loop_lag_s: float) -> float:
        """How long tokens may be merged; 0: send at once."""
        share = self._num_streams / max(self._gap_s, 1e-4) * MESSAGE_COST_S
        if share <= IMMEDIATE_SHARE and loop_lag_s <= MAX_IMMEDIATE_LAG_S:
            return 0.0
        wanted_s = max(self._num_streams * MESSAGE_COST_S / MERGED_SHARE, 2 * loop_lag_s)
        return min(max(wanted_s, MIN_INTERVAL_S), self._max_interval_s)

"""Does the executor get on with the work there is? A watchdog that only tells.

An executor may answer every heartbeat and still be of no use: its device hangs, or nothing is
ever planned. What is measured is therefore the work: a step that ended, or nothing to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LONGEST_BEAT_S: Final = 1.0


class ProgressWatch:
    """Stalled once neither a step ended nor the executor was idle for a period."""

    def __init__(
        self, period_s: float, is_idle: Callable[[], bool], on_change: Callable[[], None]
    ) -> None:
        """Nothing is watched before `run`.

        Args:
            period_s: how long a step may take; a stall is found within two of these [s].
            is_idle: whether an executor is there and has nothing to do.
            on_change: called when `is_stalled` has changed.
        """
        self.is_stalled = False
        self._period_s = period_s
        self._is_idle = is_idle
        self._on_change = on_change
        self._quiet_s = 0.0  # since the last progress

    def advanced(self) -> None:
        """A step has ended, or an executor begins anew."""
        self._quiet_s = 0.0
        self._set_stalled(False)

    def lost(self) -> None:
        """The executor is known to be stuck."""
        self._quiet_s = self._period_s
        self._set_stalled(True)

    async def run(self) -> None:
        """Watch until cancelled.

        Time is counted in beats of this loop: while the process itself is stopped, none passes.
        """
        beat_s = min(_LONGEST_BEAT_S, self._period_s / 4)
        while True:
            await asyncio.sleep(beat_s)
            if self._is_idle():
                self.advanced()
                continue
            self._quiet_s += beat_s
            if self._quiet_s >= self._period_s:
                self._set_stalled(True)

    def _set_stalled(self, is_stalled: bool) -> None:
        if is_stalled != self.is_stalled:
            self.is_stalled = is_stalled
            self._on_change()

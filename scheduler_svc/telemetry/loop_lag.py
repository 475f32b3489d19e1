"""How late the event loop runs."""

from __future__ import annotations

import asyncio
from typing import Final

PERIOD_S: Final = 0.020
_SMOOTHING: Final = 0.2


class LoopLag:
    """Measures by how much a periodic timer is late; smoothed."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        """Look every `period_s`, which costs some 20 us of CPU each time."""
        self.value_s = 0.0
        self._period_s = period_s

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._period_s
            await asyncio.sleep(self._period_s)
            lag_s = max(0.0, loop.time() - due_s)
            self.value_s += _SMOOTHING * (lag_s - self.value_s)

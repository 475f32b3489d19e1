"""How late the event loop runs."""

from __future__ import annotations

import asyncio
from typing import Final

_PERIOD_S: Final = 0.020
_SMOOTHING: Final = 0.2


class LoopLag:
    """Measures by how much a periodic timer is late; smoothed."""

    def __init__(self) -> None:
        self.value_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _PERIOD_S
            await asyncio.sleep(_PERIOD_S)
            lag_s = max(0.0, loop.time() - due_s)
            self.value_s += _SMOOTHING * (lag_s - self.value_s)

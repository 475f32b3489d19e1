"""Short calls, as many as a front end answers: `python -m benchmarks.flood ADDRESS`."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Final

import uvloop

from blockyard.client import AsyncClient

_NUM_IN_FLIGHT: Final = 32


async def _call_forever(client: AsyncClient) -> None:
    while True:
        await client.model()


async def flood(address: str) -> None:
    """Call until SIGTERM. Raises BlockyardError if a call fails."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncClient(address) as client:
        calls = [asyncio.create_task(_call_forever(client)) for _ in range(_NUM_IN_FLIGHT)]
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*calls, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        for task in calls:
            task.cancel()


if __name__ == "__main__":
    uvloop.run(flood(sys.argv[1]))

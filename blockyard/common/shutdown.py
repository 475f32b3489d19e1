"""How a service process learns that it shall end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from blockyard.common.logs import event

log = logging.getLogger(__name__)


def on_first_signal() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process at once.

    The exit code is then 128 + the signal's number. Call it inside the running loop.
    """
    shutdown = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if shutdown.is_set():
            log.warning("second signal, exiting at once")
            os._exit(128 + number)
        event(log, "signal", name=number.name)
        shutdown.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return shutdown

"""Running the programs of `tools` beside ours: free ports, started, answered, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from integration_tests.harness import Process

_POLL_S: Final = 0.02
_START_TIMEOUT_S: Final = 20.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running_peer(
    directory: Path, name: str, command: Sequence[object], port: int
) -> AsyncIterator[Process]:
    """Start a program and wait until it listens on `port`; kill it at the end.

    Args:
        directory: its output goes to `<name>.log` there.
        name: for that.
        command: its words.
        port: on 127.0.0.1.
    """
    process = Process(directory, name, command)
    await process.start()
    try:
        await _listening(process, port)
        yield process
    finally:
        await process.kill()


async def _listening(process: Process, port: int) -> None:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while process.is_running:
                with contextlib.suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        pass
    raise AssertionError(f"nobody listens on port {port}; its output:\n{process.log()}")

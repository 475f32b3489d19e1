"""Child processes of a benchmark: started, waited for, stopped."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import grpc

_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.02
_CPUCLOCK_SCHED: Final = 2
"""Linux's tag of a clock id that is made of a pid."""


class ProcessError(Exception):
    """A child did not start or died; the message holds the end of its output."""


class Processes:
    """Python modules run as children, each with its output in a file of `run_dir`."""

    def __init__(self, run_dir: pathlib.Path) -> None:
        self.run_dir = run_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def socket(self, name: str) -> str:
        """A gRPC address inside the run folder."""
        return f"unix:{self.run_dir / name}.sock"

    async def start(self, name: str, module: str, arguments: Sequence[str], address: str) -> int:
        """Run `python -m module arguments`; returns its pid once `address` accepts connections.

        Raises ProcessError.
        """
        with self._log(name).open("wb") as log:
            # Not asyncio's: uvloop forks by itself, which may hang once gRPC's threads run.
            process = subprocess.Popen(  # noqa: ASYNC220 - returns as soon as the child runs
                (sys.executable, "-m", module, *arguments), stdout=log, stderr=log
            )
        self._running[name] = process
        async with grpc.aio.insecure_channel(address) as channel:
            ready = asyncio.create_task(channel.channel_ready())
            died = asyncio.create_task(_end(process))
            await asyncio.wait(
                {ready, died}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            is_ready = ready.done()
            for task in (ready, died):
                task.cancel()
        if not is_ready:
            raise ProcessError(f"{name} did not start:\n{self.tail(name)}")
        return process.pid

    def tail(self, name: str) -> str:
        """The end of a child's output."""
        return self._log(name).read_text(errors="replace")[-2000:]

    async def stop(self, name: str) -> None:
        """End one child with SIGTERM and wait for it. Raises ProcessError if it ended badly."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(_end(process), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await _end(process)
            raise ProcessError(f"{name} did not stop:\n{self.tail(name)}") from None
        if code != 0:
            raise ProcessError(f"{name} ended with {code}:\n{self.tail(name)}")

    async def kill_all(self) -> None:
        """Kill what still runs."""
        for process in self._running.values():
            process.kill()
            await _end(process)

    def _log(self, name: str) -> pathlib.Path:
        return self.run_dir / f"{name}.log"


@asynccontextmanager
async def processes() -> AsyncIterator[Processes]:
    """Children that live no longer than the block; their files go with them."""
    with tempfile.TemporaryDirectory(prefix="blockyard-bench-") as run_dir:
        children = Processes(pathlib.Path(run_dir))
        try:
            yield children
        finally:
            await children.kill_all()


async def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child; returns its exit code."""
    while (code := process.poll()) is None:  # noqa: ASYNC110 - nobody signals the end
        await asyncio.sleep(_POLL_S)
    return code


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used [s], all threads."""
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    fields = stat.rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def cpu_ns(pid: int) -> int:
    """As `cpu_seconds`, to the nanosecond: by the process's own clock, see clock_getres(2)."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def resident_mib(pid: int) -> float:
    """Memory of a process that is in RAM [MiB]."""
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def all_cpu_seconds() -> float:
    """CPU time that the whole machine has used, and what its host took from it [s]."""
    fields = pathlib.Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def pin(pid: int, cpus: set[int]) -> None:
    """Let all threads of a process, and those it will start, run on these CPUs only."""
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cpus)

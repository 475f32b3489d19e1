"""One supervised process: started, its output relayed, restarted when it dies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blockyard.common.logs import event
from blockyard.common.process import PARENT_VARIABLE

CONFIGURATION_EXIT_CODE: Final = 2
"""A child that ends with this has unusable settings: starting it again would not help."""

MAX_STARTUP_DEATHS: Final = 5
STARTUP_WINDOW_S: Final = 60.0
_BACKOFF_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_HEALTHY_AFTER_S: Final = 30.0
_RELAY_GRACE_S: Final = 1.0
_READ_BYTES: Final = 1 << 16

log = logging.getLogger(__name__)

LineSink = Callable[[str, str], None]
"""Called with a child's name and one line of its output, without the newline."""


class ServeError(Exception):
    """The server cannot run or go on. The message is for people; `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to run a child, and how long it may take to end after SIGTERM."""

    name: str
    command: tuple[str, ...]
    stop_grace_s: float


class Child:
    """Keeps one process running. `is_up` says whether its deaths still count as start-up."""

    def __init__(self, spec: ChildSpec, sink: LineSink, is_up: Callable[[], bool]) -> None:
        self.spec = spec
        self._sink = sink
        self._is_up = is_up
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._deaths: collections.deque[float] = collections.deque(maxlen=MAX_STARTUP_DEATHS)
        self._num_quick_deaths = 0
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)

    @property
    def pid(self) -> int | None:
        """Process id, or None while there is no process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> asyncio.Task[None]:
        """Keep it running until `stop` or `kill`.

        The task raises ServeError on a configuration error or a crash loop at start-up.
        """
        self._task = asyncio.create_task(self._run())
        return self._task

    async def stop(self) -> None:
        """Ask it to end, and kill it if it does not within its grace."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._task is None:
            return
        await asyncio.wait({self._task}, timeout=self.spec.stop_grace_s)
        if not self._task.done():
            log.warning("%s did not end in %g s: killed", self.spec.name, self.spec.stop_grace_s)
            self._signal(signal.SIGKILL)
            await asyncio.wait({self._task})

    def kill(self) -> None:
        """End it now, for good."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def replace(self) -> None:
        """Kill the process, if there is one; a new one is started."""
        self._signal(signal.SIGKILL)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if code == CONFIGURATION_EXIT_CODE:
                raise self._error("cannot run with these settings", code)
            delay = self._note_death(started)
            event(log, f"{self.spec.name} died", status=_describe(code), restart_in_s=delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing to one that has ended

    async def _run_once(self) -> int:
        output, transport, write_fd = await _open_pipe()
        try:
            if self._stopping.is_set():  # while the pipe was being opened
                transport.close()
                return 0
            self._process = _spawn(self.spec.command, write_fd)
        finally:
            os.close(write_fd)
        event(log, f"started {self.spec.name}", pid=self._process.pid)
        relay = asyncio.create_task(self._relay(output))
        code = await _exit_of(self._process)
        # A process that the child left behind may hold the pipe open.
        await asyncio.wait({relay}, timeout=_RELAY_GRACE_S)
        relay.cancel()
        transport.close()
        return code

    async def _relay(self, output: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await output.read(_READ_BYTES):
            # A progress bar redraws its line with carriage returns.
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                self._emit(line)
        self._emit(rest)

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_lines.append(text)
            self._sink(self.spec.name, text)

    def _note_death(self, started: float) -> float:
        """Count it; returns how long to wait before the next start [s]. Raises ServeError."""
        now = time.monotonic()
        self._deaths.append(now)
        is_full = len(self._deaths) == MAX_STARTUP_DEATHS
        if not self._is_up() and is_full and now - self._deaths[0] <= STARTUP_WINDOW_S:
            raise self._error(f"died {MAX_STARTUP_DEATHS} times while starting", 1)
        self._num_quick_deaths = (
            0 if now - started > _HEALTHY_AFTER_S else self._num_quick_deaths + 1
        )
        return _BACKOFF_S[min(self._num_quick_deaths, len(_BACKOFF_S) - 1)]

    def _error(self, what: str, exit_code: int) -> ServeError:
        tail = "".join(f"\n  {line}" for line in self._last_lines)
        return ServeError(f"{self.spec.name} {what}; its last output:{tail}", exit_code)


def _spawn(command: tuple[str, ...], output_fd: int) -> subprocess.Popen[bytes]:
    """Start a process with stdout and stderr going to `output_fd`.

    By vfork and exec, unlike uvloop's fork: that runs gRPC's fork handlers, in which the child
    may crash when other threads of this process are inside gRPC.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=subprocess.STDOUT,
        # A Ctrl-C in the terminal is for the launcher, which ends its children in order.
        start_new_session=True,
    )


async def _exit_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code, once it ends; minus the signal's number if one ended it."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wait() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is gone, and nobody waits
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True, name=f"wait-{process.pid}").start()
    await ended.wait()
    return process.wait()


async def _open_pipe() -> tuple[asyncio.StreamReader, asyncio.ReadTransport, int]:
    """A pipe's reading end as a stream, the transport that closes that, and its writing end."""
    read_fd, write_fd = os.pipe()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(read_fd, "rb"))
    return reader, transport, write_fd


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

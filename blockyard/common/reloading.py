"""Values made of files that may be replaced while a service runs: certificates, tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from blockyard.common.logs import event

Value = TypeVar("Value")

_Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size and time of change of each file; a missing one has none of them."""

log = logging.getLogger(__name__)


class FileError(Exception):
    """A file cannot be used; the message names it, says why, and holds nothing of what is in it."""


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises FileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


class Reloading(Generic[Value]):
    """The newest good value of some files. A bad replacement is reported and changes nothing."""

    def __init__(
        self, paths: Sequence[Path], load: Callable[[], Value], *, look_every_s: float = 0.0
    ) -> None:
        """Load the first value. Raises FileError.

        Args:
            paths: the files that `load` reads.
            load: makes the value; raises FileError.
            look_every_s: how often `get` looks at the files at most [s].
        """
        self._paths = tuple(paths)
        self._load = load
        self._look_every_s = look_every_s
        self._looked_s = time.monotonic()
        self._lock = threading.Lock()
        # Looked at before it is read: whatever comes between is a change.
        self._stamp = self._stamp_now()
        self._value = load()

    def get(self) -> Value:
        """The value, after a look at the files. Any thread may call."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s >= self._look_every_s:
                self._looked_s = now_s
                self._look()
            return self._value

    def _look(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._load()
        except FileError as error:
            log.error("%s; what was read before stays in use", error)
        else:
            event(log, "read again", files=" ".join(map(str, self._paths)))

    def _stamp_now(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)

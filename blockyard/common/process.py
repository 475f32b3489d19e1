"""This process: its parent, and what it uses."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

_PR_SET_PDEATHSIG: Final = 1
PARENT_VARIABLE: Final = "BLOCKYARD_PARENT_PID"
"""Environment variable: the process that starts this one."""

_STATM: Final = Path("/proc/self/statm")


class ProcessUsage(NamedTuple):
    """What a process uses."""

    cpu_s: float  # of all its threads, since it started
    resident_bytes: int  # 0: not known


def process_usage() -> ProcessUsage:
    """Of this process; memory on Linux only."""
    resident_bytes = 0
    if sys.platform == "linux":
        num_pages = int(_STATM.read_text(encoding="ascii").split()[1])
        resident_bytes = num_pages * os.sysconf("SC_PAGE_SIZE")
    return ProcessUsage(time.process_time(), resident_bytes)


def exit_with_parent() -> None:
    """Ask the kernel to kill this process (SIGKILL) when its parent dies, however it dies.

    Linux only: elsewhere it does nothing, and a parent that is killed leaves its children running.
    A parent that is dead already is noticed if it named itself in PARENT_VARIABLE.
    """
    if sys.platform != "linux":
        return
    # Taken, not read: a process that this one starts has another parent.
    parent = int(os.environ.pop(PARENT_VARIABLE, None) or os.getppid())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

"""Tying a child process's life to its parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def exit_with_parent() -> None:
    """Ask the kernel to kill this process (SIGKILL) when its parent dies, however it dies.

    Linux only: elsewhere it does nothing, and a parent that is killed leaves its children running.
    Call it first thing: a parent that died before the call is noticed only while this runs.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

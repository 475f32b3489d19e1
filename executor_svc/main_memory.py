"""How much main memory there is to have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from executor_svc.kv_pool import KvPoolError

_GIB: Final = 1 << 30
_MEMINFO: Final = Path("/proc/meminfo")
_CONTAINER_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def limit_bytes(container_limits: Sequence[Path] = _CONTAINER_LIMITS) -> int:
    """Memory of the machine, or of the container that this process is in, if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in container_limits:
        # Another version of control groups, or "max".
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits)


def available_bytes(meminfo: Path = _MEMINFO) -> int:
    """What could be had now without taking it from anybody, or the limit if that is less."""
    limit = limit_bytes()
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(limit, int(line.split()[1]) * 1024)
    return limit


def check_can_lock(host_memory_bytes: int, meminfo: Path = _MEMINFO) -> None:
    """Raise KvPoolError for a host pool larger than what is available.

    Locked memory cannot be swapped out: to make room, the kernel would kill somebody.
    """
    available = available_bytes(meminfo)
    if host_memory_bytes > available:
        raise KvPoolError(
            f"host memory of {host_memory_bytes / _GIB:.1f} GiB is to be locked, and only "
            f"{available / _GIB:.1f} GiB are available; choose a smaller --host-memory"
        )


def check_pools_fit(kv_memory_bytes: int, host_memory_bytes: int) -> None:
    """Raise KvPoolError for pools larger than all memory.

    The kernel would promise the memory, and kill this process while it is being touched.
    """
    limit = limit_bytes()
    if kv_memory_bytes + host_memory_bytes > limit:
        pools = f"KV memory of {kv_memory_bytes / _GIB:.1f} GiB"
        if host_memory_bytes:
            pools += f" and host memory of {host_memory_bytes / _GIB:.1f} GiB"
        raise KvPoolError(f"{pools}: there are only {limit / _GIB:.1f} GiB of memory")

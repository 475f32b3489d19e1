"""How much main memory there is to have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from executor_svc.kv_pool import KvPoolError

_GIB: Final = 1 << 30
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

"""Blocks of keys and values: a device pool of fixed size, a host pool, and whole-block copies."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from executor_svc.plan import Pairs

_HUGE_PAGE_BYTES: Final = 2 << 20


class KvPoolError(Exception):
    """The memory given holds no usable pool, or could not be had."""


class KvPool:
    """Two arrays of blocks. A block is opaque here; its layout belongs to the backend.

    Device block 0 is the padding block: it is never copied to. On a CPU both pools are main
    memory, and copies are done when the call returns.
    """

    def __init__(self, num_device_blocks: int, num_host_blocks: int, block_bytes: int) -> None:
        """Allocate and touch all memory. Raises KvPoolError if it cannot be had."""
        assert num_device_blocks >= 2
        assert block_bytes % 4 == 0
        self.block_bytes = block_bytes
        self.device = _allocate(num_device_blocks, block_bytes)
        self.host = _allocate(num_host_blocks, block_bytes)

    @staticmethod
    def num_blocks(memory_bytes: int, block_bytes: int) -> int:
        """Device blocks, the padding block included, that fit. Raises KvPoolError if under 2."""
        count = memory_bytes // block_bytes
        if count < 2:
            raise KvPoolError(
                f"KV memory of {memory_bytes} bytes holds {count} blocks of {block_bytes} bytes; "
                "at least 2 are needed, one of them for padding"
            )
        return count

    @property
    def num_device_blocks(self) -> int:
        """Block 0 included."""
        return len(self.device)

    @property
    def num_host_blocks(self) -> int:
        """0 if there is no host pool."""
        return len(self.host)

    def swap_out(self, pairs: Pairs) -> None:
        """Copy device blocks `src` to host blocks `dst`."""
        _copy(self.device, self.host, pairs)

    def copy(self, pairs: Pairs) -> None:
        """Copy device blocks; no id is both source and destination."""
        _copy(self.device, self.device, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy host blocks `src` to device blocks `dst`."""
        _copy(self.host, self.device, pairs)


def _copy(source: npt.NDArray[np.float32], target: npt.NDArray[np.float32], pairs: Pairs) -> None:
    for src, dst in zip(pairs.src.tolist(), pairs.dst.tolist(), strict=True):
        target[dst] = source[src]


def _allocate(num_blocks: int, block_bytes: int) -> npt.NDArray[np.float32]:
    """Zeroed blocks [num_blocks, block_bytes / 4] on huge pages: attention reads them at random."""
    num_bytes = num_blocks * block_bytes
    if not num_bytes:
        return np.zeros((0, block_bytes // 4), np.float32)
    memory = map_memory(num_bytes)
    blocks = np.frombuffer(memory, np.float32).reshape(num_blocks, block_bytes // 4)
    # Touch every page now, so that a lack of memory shows at start.
    blocks.fill(0)
    return blocks


def map_memory(num_bytes: int) -> mmap.mmap:
    """Zeroed memory of this process alone, on huge pages if it is large; nothing is touched yet.

    Raises KvPoolError.
    """
    try:
        # Private: shared memory would get no huge pages.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise KvPoolError(f"cannot allocate {num_bytes} bytes of KV memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= _HUGE_PAGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory

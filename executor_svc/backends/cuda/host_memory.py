"""Page-locked main memory for the host pool: copies to and from it run beside everything else.

Mapped and locked here: torch's own allocator of such memory rounds up to a power of two, so that a
pool of 33 GiB would take 64.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from cupy_kernels.device import import_cupy
from executor_svc.kv_pool import KvPoolError, map_memory

if TYPE_CHECKING:
    import mmap

_GIB: Final = 1 << 30
_FLAGS: Final = 0  # cudaHostRegisterDefault


class HostBlocks:
    """Blocks that stay locked while this object lives.

    Attributes:
        blocks: [num_blocks, block_bytes] uint8; what is in them at first is zero.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Map and lock; 0 blocks take nothing. Raises KvPoolError."""
        size = (num_blocks, block_bytes)
        num_bytes = num_blocks * block_bytes
        if not num_bytes:
            self.blocks: Tensor = torch.empty(size, dtype=torch.uint8)
            return
        memory = map_memory(num_bytes)
        self.blocks = torch.frombuffer(memory, dtype=torch.uint8).view(size)
        runtime: Any = import_cupy().cuda.runtime
        address = self.blocks.data_ptr()
        try:
            runtime.hostRegister(address, num_bytes, _FLAGS)
        except runtime.CUDARuntimeError as error:
            raise KvPoolError(
                f"{num_bytes / _GIB:.1f} GiB of host memory cannot be locked ({error}): choose a "
                "smaller --host-memory, or raise the limit of locked memory (ulimit -l)"
            ) from error
        # The end of the process unlocks by itself, and the device may be lost by then.
        weakref.finalize(self, _unlock, runtime, address, memory).atexit = False


def _unlock(runtime: Any, address: int, memory: mmap.mmap) -> None:
    """Before `memory` is unmapped, which holding it until now makes sure of."""
    with contextlib.suppress(runtime.CUDARuntimeError):  # a lost device holds no lock
        runtime.deviceSynchronize()
    with contextlib.suppress(runtime.CUDARuntimeError):
        runtime.hostUnregister(address)

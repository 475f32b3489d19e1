"""Copies of whole blocks on the device: one launch for all pairs of a step."""

from __future__ import annotations

from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address

_THREADS: Final = 512
_PIECE_BYTES: Final = _THREADS * 4 * 16


def copy_blocks_variant() -> Variant:
    """The kernel; it knows no layout."""
    return Variant("copy_blocks")


class CopyBlocks:
    """Launches of sources/copy_blocks.cu."""

    def __init__(self, device: Device) -> None:
        """Load the kernel."""
        self._kernel = device.load(copy_blocks_variant())

    def pack(self, *, pool: DeviceTensor, sources: DeviceTensor, targets: DeviceTensor) -> Launch:
        """Copy block sources[i] to block targets[i], for all layers.

        Args:
            pool: [num_blocks, block_bytes] uint8; block_bytes is a multiple of 16.
            sources: [n] int32 block ids, n > 0.
            targets: [n] int32 block ids, all different, none of them a source.
        """
        num_pairs = sources.shape[0]
        block_bytes = pool.shape[1]
        assert block_bytes % 16 == 0, block_bytes
        pieces = -(-block_bytes // _PIECE_BYTES)
        params = {
            "pool": address(pool, "uint8", None, block_bytes),
            "sources": address(sources, "int32", num_pairs),
            "targets": address(targets, "int32", num_pairs),
            "block_bytes": block_bytes,
            "pieces_per_block": pieces,
        }
        return Launch(self._kernel, num_pairs * pieces, _THREADS, params)

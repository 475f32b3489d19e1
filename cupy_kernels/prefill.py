"""Causal paged attention of runs of new tokens: prompts, and chunks of them.

Two kernels do the same: sources/prefill.cu on every GPU, sources/prefill_wgmma.cu where
`uses_wgmma` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cupy_kernels.cubins import target_of
from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import LOG2_E, AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address
from cupy_kernels.write_kv import layer_address

IntArray = npt.NDArray[np.int32]

ITEM_INTS: Final = 4

_WARPS: Final = 4

_WGMMA_HEAD_DIMS: Final = (64, 128)
_WGMMA_THREADS: Final = 3 * 128  # two consumers and a producer
_WGMMA_SPAN_TILES: Final = 8


def uses_wgmma(target: str, shape: AttentionShape) -> bool:
    """Whether prefill for a model on a target such as sm_90a is by sources/prefill_wgmma.cu."""
    return target == "sm_90a" and shape.head_dim in _WGMMA_HEAD_DIMS


@dataclass(frozen=True, slots=True)
class PrefillKernel:
    """One of the kernels for a model."""

    variant: Variant
    threads: int
    shared_bytes: int
    is_persistent: bool  # blocks of threads, one per SM, go on to further items


def prefill_kernel(shape: AttentionShape, target: str) -> PrefillKernel:
    """The kernel for a model on a target such as sm_90a."""
    return wgmma_prefill(shape) if uses_wgmma(target, shape) else plain_prefill(shape)


def plain_prefill(shape: AttentionShape) -> PrefillKernel:
    """The kernel for all GPUs. Shared memory: query rows, and two spans of the context."""
    constants = _constants(shape)
    query = _rows_per_item(shape) * shape.head_dim * 2
    return PrefillKernel(
        variant=Variant("prefill", shape.defines | constants),
        threads=32 * _WARPS,
        shared_bytes=query + 2 * constants["SPAN_TILES"] * shape.tile_bytes,
        is_persistent=False,
    )


def wgmma_prefill(shape: AttentionShape) -> PrefillKernel:
    """The kernel for Hopper, head_dim 64 or 128.

    Shared memory: stages with three barriers each, up to a multiple of 1,024 bytes, query rows, and
    a word per consumer thread.
    """
    assert shape.head_dim in _WGMMA_HEAD_DIMS, shape
    stages = 3 if shape.head_dim == 128 else 4
    ring = stages * (_WGMMA_SPAN_TILES * shape.tile_bytes + 3 * 8)
    query = _rows_per_item(shape) * shape.head_dim * 2
    return PrefillKernel(
        variant=Variant("prefill_wgmma", shape.defines | {"STAGES": stages}),
        threads=_WGMMA_THREADS,
        shared_bytes=-(-ring // 1024) * 1024 + query + 2 * 128 * 4,
        is_persistent=True,
    )


def _constants(shape: AttentionShape) -> dict[str, int]:
    """What fits a warp's registers: the output of 16 * ROW_TILES query rows, a span's scores."""
    if shape.head_dim == 256:
        return {"ROW_TILES": 1, "SPAN_TILES": 2}
    return {"ROW_TILES": 2, "SPAN_TILES": 4}


def _rows_per_item(shape: AttentionShape) -> int:
    """Query rows of an item, in both kernels."""
    return _WARPS * 16 * _constants(shape)["ROW_TILES"]


def prefill_items(
    shape: AttentionShape,
    rows: IntArray,
    num_scheduled_tokens: IntArray,
    num_computed_tokens: IntArray,
    *,
    first_query: int = 0,
) -> IntArray:
    """Cut a step's rows into items, costliest first, on the host.

    Args:
        shape: the model's.
        rows: [n], each row's place in the block table.
        num_scheduled_tokens: [n], new tokens of each row, at least 1; rows follow each other in
            the batch.
        num_computed_tokens: [n], tokens of each row that precede them.
        first_query: index in the batch of the first row's first token.

    Returns:
        [items, 4] int32: row, first query (index in the batch), number of queries, first position.
    """
    tokens_per_item = _rows_per_item(shape) // shape.group
    counts = -(-num_scheduled_tokens // tokens_per_item)
    batch_starts = first_query + np.cumsum(num_scheduled_tokens) - num_scheduled_tokens
    which = np.repeat(np.arange(len(rows)), counts)
    begins = (np.arange(len(which)) - (np.cumsum(counts) - counts)[which]) * tokens_per_item
    num_queries = np.minimum(tokens_per_item, num_scheduled_tokens[which] - begins)
    positions = num_computed_tokens[which] + begins
    items = np.stack([rows[which], batch_starts[which] + begins, num_queries, positions], axis=1)
    order = np.argsort(-(positions + num_queries), kind="stable")
    return np.ascontiguousarray(items[order], np.int32)


class Prefill:
    """Launches of prefill for one model."""

    def __init__(
        self, device: Device, shape: AttentionShape, kernel: PrefillKernel | None = None
    ) -> None:
        """Load the kernel; by default the one for the device."""
        self._shape = shape
        self._num_sms = device.num_sms
        self._choice = kernel or prefill_kernel(shape, target_of(device.capability))
        self._kernel = device.load(self._choice.variant, self._choice.shared_bytes)

    def pack(
        self,
        *,
        query: DeviceTensor,
        out: DeviceTensor,
        pool: DeviceTensor,
        layer: int,
        block_table: DeviceTensor,
        items: DeviceTensor,
    ) -> Launch:
        """Attend for the tokens of all items; their keys and values are in the cache already.

        Args:
            query: [num_tokens, >= num_heads * head_dim] of the shape's element type, rotated; the
                packed qkv will do.
            out: [num_tokens, num_heads * head_dim] of the same type.
            pool: [num_blocks, block_bytes] uint8.
            layer: whose part of the blocks to read.
            block_table: [max_rows, max_blocks_per_row] int32.
            items: [n, 4] int32, from prefill_items.
        """
        shape = self._shape
        num_items = items.shape[0]
        params = {
            "query": address(query, shape.element, None, query.shape[1]),
            "out": address(out, shape.element, None, shape.num_heads * shape.head_dim),
            "pool": layer_address(pool, shape, layer),
            "block_table": address(block_table, "int32", None, None),
            "items": address(items, "int32", num_items, ITEM_INTS),
            "block_bytes": shape.block_bytes,
            "query_stride": query.shape[1],
            "table_stride": block_table.shape[1],
            "num_items": num_items,
            "num_kv_heads": shape.num_kv_heads,
            "group": shape.group,
            "block_size": shape.block_size,
            "scale_log2": LOG2_E * shape.head_dim**-0.5,
        }
        choice = self._choice
        blocks = self._blocks(num_items)
        return Launch(self._kernel, blocks, choice.threads, params, choice.shared_bytes)

    def resize(self, launch: Launch, items: DeviceTensor) -> Launch:
        """The launch for other items [n, 4]."""
        num_items = items.shape[0]
        return launch.resize(
            self._blocks(num_items),
            items=address(items, "int32", num_items, ITEM_INTS),
            num_items=num_items,
        )

    def _blocks(self, num_items: int) -> int:
        """Blocks of threads; each takes one or, if persistent, some pairs of item and KV head."""
        pairs = num_items * self._shape.num_kv_heads
        return min(pairs, self._num_sms) if self._choice.is_persistent else pairs

"""Causal paged attention of runs of new tokens: prompts, and chunks of them."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import LOG2_E, AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address
from cupy_kernels.write_kv import layer_address

IntArray = npt.NDArray[np.int32]

ITEM_INTS: Final = 4

_WARPS: Final = 4
_THREADS: Final = 32 * _WARPS


def _constants(shape: AttentionShape) -> dict[str, int]:
    """What fits a warp's registers: the output of 16 * ROW_TILES query rows, a span's scores."""
    if shape.head_dim == 256:
        return {"ROW_TILES": 1, "SPAN_TILES": 2}
    return {"ROW_TILES": 2, "SPAN_TILES": 4}


def prefill_variant(shape: AttentionShape) -> Variant:
    """The kernel for a model."""
    return Variant("prefill", shape.defines | _constants(shape))


def _rows_per_item(shape: AttentionShape) -> int:
    return _WARPS * 16 * _constants(shape)["ROW_TILES"]


def prefill_shared_bytes(shape: AttentionShape) -> int:
    """Query rows, and two spans of the context."""
    query = _rows_per_item(shape) * shape.head_dim * 2
    return query + 2 * _constants(shape)["SPAN_TILES"] * shape.tile_bytes


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
    """Launches of sources/prefill.cu for one model."""

    def __init__(self, device: Device, shape: AttentionShape) -> None:
        """Load the kernel."""
        self._shape = shape
        self._shared_bytes = prefill_shared_bytes(shape)
        self._kernel = device.load(prefill_variant(shape), self._shared_bytes)

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
        blocks = num_items * shape.num_kv_heads
        return Launch(self._kernel, blocks, _THREADS, params, self._shared_bytes)

    def resize(self, launch: Launch, items: DeviceTensor) -> Launch:
        """The launch for other items [n, 4]."""
        num_items = items.shape[0]
        return launch.resize(
            num_items * self._shape.num_kv_heads,
            items=address(items, "int32", num_items, ITEM_INTS),
            num_items=num_items,
        )

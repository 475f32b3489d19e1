"""Paged attention of one query token per row: the work list, the split kernel, the plain kernel.

A step plans once and attends once per layer:

    planner = SplitPlanner(device, shape); decode = Decode(device, shape)
    planner.pack(rows=..., seq_lens=..., work=work).run(stream)
    decode.pack(..., work=work, layer=layer).run(stream)      # for each layer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import LOG2_E, TILE_TOKENS, AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address
from cupy_kernels.write_kv import layer_address

MAX_ROWS: Final = 2048
ITEM_INTS: Final = 8

_WARPS: Final = 4
_WARP_SIZE: Final = 32
_PLANNER_THREADS: Final = 256

# Measured on H200 (docs/kernels.md). While little is read, one item per SM at a time fills the
# memory's bandwidth, and fewer parts are merged sooner.
_SMALL_KV_BYTES: Final = 50 * 10**6
_MIN_CHUNK_TOKENS: Final = 64
# Longer items leave SMs idle at the end of a step.
_MAX_CHUNK_TOKENS: Final = 3072
_BATCH_INVARIANT_CHUNK_TOKENS: Final = 512

# Per head_dim: bytes that a block of threads has under way, and for how many blocks per SM there
# are registers. Fewer bytes make warps wait; fewer blocks leave an SM idle while one of them begins
# or merges.
_RING_BYTES: Final = {64: 48 << 10, 96: 48 << 10, 128: 96 << 10, 256: 192 << 10}
_BLOCKS_PER_SM: Final = {64: 4, 96: 3, 128: 2, 256: 1}
_RESERVED_SHARED_BYTES: Final = 2 << 10


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """How long the parts may be that rows are cut into, in tiles of 16 tokens.

    Between these limits sources/split_plan.cu chooses by the whole batch, so that the GPU is full.
    """

    min_tiles: int = _MIN_CHUNK_TOKENS // TILE_TOKENS
    max_tiles: int = _MAX_CHUNK_TOKENS // TILE_TOKENS


FAST: Final = ChunkRule()

BATCH_INVARIANT: Final = ChunkRule(
    _BATCH_INVARIANT_CHUNK_TOKENS // TILE_TOKENS, _BATCH_INVARIANT_CHUNK_TOKENS // TILE_TOKENS
)
"""A row's result has the same bits in every batch, if the work list has room for all parts."""


def small_tiles(shape: AttentionShape) -> int:
    """So many tiles, over all KV heads, are read so fast that overheads count more."""
    return _SMALL_KV_BYTES // shape.tile_bytes


def item_capacity(num_rows: int, num_kv_heads: int, num_sms: int) -> int:
    """Length of a work list that never limits the fast chunks in practice."""
    heads = num_rows * num_kv_heads
    return heads + min(max(2 * num_sms, 2 * heads), 8 * num_sms)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Device memory that planner and kernel share, for up to `num_rows` rows.

    Attributes:
        items: [capacity, 8] int32, the work list.
        partial_out: [capacity, group, head_dim] float32, unnormalised outputs of parts.
        partial_norms: [capacity, group, 2] float32, their (max, sum) in base 2.
        arrivals: [num_rows, num_kv_heads] int32.
    """

    items: DeviceTensor
    partial_out: DeviceTensor
    partial_norms: DeviceTensor
    arrivals: DeviceTensor

    @property
    def capacity(self) -> int:
        """Most items, and the grid of the attention."""
        return self.items.shape[0]


def split_plan_variant() -> Variant:
    """The planner; one for all models."""
    return Variant("split_plan")


class SplitPlanner:
    """Launches of sources/split_plan.cu for one model."""

    def __init__(self, device: Device, shape: AttentionShape, rule: ChunkRule = FAST) -> None:
        """Load the kernel."""
        self._shape = shape
        self._rule = rule
        self._num_sms = device.num_sms
        self._kernel = device.load(split_plan_variant())

    def pack(self, *, rows: DeviceTensor, seq_lens: DeviceTensor, work: DecodeWork) -> Launch:
        """Fill the work list of a step.

        Args:
            rows: [num_rows] int32, each row's place in the block table.
            seq_lens: [num_rows] int32, this step's token included; 0 for padding.
            work: its items are overwritten, its arrivals set to 0.
        """
        shape, rule = self._shape, self._rule
        num_rows = rows.shape[0]
        heads = num_rows * shape.num_kv_heads
        assert num_rows <= MAX_ROWS, num_rows
        assert heads < work.capacity, "the work list is too short for the batch"
        assert work.arrivals.shape[0] >= num_rows
        params = {
            "rows": address(rows, "int32", num_rows),
            "seq_lens": address(seq_lens, "int32", num_rows),
            "items": address(work.items, "int32", None, ITEM_INTS),
            "arrivals": address(work.arrivals, "int32", None, shape.num_kv_heads),
            "num_rows": num_rows,
            "num_kv_heads": shape.num_kv_heads,
            "capacity": work.capacity,
            "num_sms": self._num_sms,
            "small_tiles": small_tiles(shape),
            "min_chunk_tiles": rule.min_tiles,
            "max_chunk_tiles": rule.max_tiles,
        }
        return Launch(self._kernel, self._num_blocks(num_rows), _PLANNER_THREADS, params)

    def resize(self, launch: Launch, num_rows: int) -> Launch:
        """The launch for another number of rows, at most those that it was packed for."""
        capacity = item_capacity(num_rows, self._shape.num_kv_heads, self._num_sms)
        return launch.resize(self._num_blocks(num_rows), num_rows=num_rows, capacity=capacity)

    @staticmethod
    def _num_blocks(num_rows: int) -> int:
        """Each warp plans one row."""
        return -(-num_rows * _WARP_SIZE // _PLANNER_THREADS)


def decode_variant(shape: AttentionShape, max_shared_bytes: int) -> Variant:
    """The kernel for a model on a device with so much shared memory per block of threads."""
    head_tiles = -(-shape.group // 8)
    ring_bytes = min(_RING_BYTES[shape.head_dim], max_shared_bytes - _RESERVED_SHARED_BYTES)
    constants = {
        "HEAD_TILES": head_tiles,
        "STAGES": max(1, ring_bytes // (_WARPS * shape.tile_bytes)),
        "BLOCKS_PER_SM": min(_BLOCKS_PER_SM[shape.head_dim], 4 // head_tiles),
    }
    return Variant("decode", shape.defines | constants)


class Decode:
    """Launches of sources/decode.cu for one model."""

    def __init__(self, device: Device, shape: AttentionShape) -> None:
        """Load the kernel."""
        self._shape = shape
        self._num_sms = device.num_sms
        variant = decode_variant(shape, device.max_shared_bytes)
        self._shared_bytes = variant.defines["STAGES"] * _WARPS * shape.tile_bytes
        self._kernel = device.load(variant, self._shared_bytes)

    def pack(
        self,
        *,
        query: DeviceTensor,
        out: DeviceTensor,
        pool: DeviceTensor,
        layer: int,
        block_table: DeviceTensor,
        work: DecodeWork,
    ) -> Launch:
        """Attend as the work list says. Rows of length 0 leave their output as it is.

        Args:
            query: [>= num_rows, >= num_heads * head_dim] of the shape's element type, rotated;
                the packed qkv will do.
            out: [>= num_rows, num_heads * head_dim] of the same type.
            pool: [num_blocks, block_bytes] uint8.
            layer: whose part of the blocks to read.
            block_table: [max_rows, max_blocks_per_row] int32.
            work: as planned for this step.
        """
        shape = self._shape
        params = {
            "query": address(query, shape.element, None, query.shape[1]),
            "out": address(out, shape.element, None, shape.num_heads * shape.head_dim),
            "pool": layer_address(pool, shape, layer),
            "block_table": address(block_table, "int32", None, None),
            "items": address(work.items, "int32", None, ITEM_INTS),
            "partial_out": address(
                work.partial_out, "float32", work.capacity, shape.group, shape.head_dim
            ),
            "partial_norms": address(work.partial_norms, "float32", work.capacity, shape.group, 2),
            "arrivals": address(work.arrivals, "int32", None, shape.num_kv_heads),
            "block_bytes": shape.block_bytes,
            "query_stride": query.shape[1],
            "table_stride": block_table.shape[1],
            "num_kv_heads": shape.num_kv_heads,
            "group": shape.group,
            "block_size": shape.block_size,
            "scale_log2": LOG2_E * shape.head_dim**-0.5,
        }
        return Launch(self._kernel, work.capacity, _WARPS * _WARP_SIZE, params, self._shared_bytes)

    def resize(self, launch: Launch, num_rows: int) -> Launch:
        """The launch for as many rows as the planner's was resized to."""
        return launch.resize(item_capacity(num_rows, self._shape.num_kv_heads, self._num_sms))


class DecodePlain:
    """Launches of sources/decode_plain.cu, the slow and obvious kernel that tests compare with."""

    def __init__(self, device: Device, shape: AttentionShape) -> None:
        """Load the kernel."""
        self._shape = shape
        self._kernel = device.load(Variant("decode_plain", shape.defines))

    def pack(
        self,
        *,
        query: DeviceTensor,
        out: DeviceTensor,
        pool: DeviceTensor,
        layer: int,
        block_table: DeviceTensor,
        rows: DeviceTensor,
        seq_lens: DeviceTensor,
    ) -> Launch:
        """As Decode.pack; rows and seq_lens as SplitPlanner.pack."""
        shape = self._shape
        num_rows = rows.shape[0]
        params = {
            "query": address(query, shape.element, None, query.shape[1]),
            "out": address(out, shape.element, None, shape.num_heads * shape.head_dim),
            "pool": layer_address(pool, shape, layer),
            "block_table": address(block_table, "int32", None, None),
            "rows": address(rows, "int32", num_rows),
            "seq_lens": address(seq_lens, "int32", num_rows),
            "block_bytes": shape.block_bytes,
            "query_stride": query.shape[1],
            "table_stride": block_table.shape[1],
            "num_heads": shape.num_heads,
            "group": shape.group,
            "block_size": shape.block_size,
            "scale": shape.head_dim**-0.5,
        }
        return Launch(self._kernel, num_rows * shape.num_heads, _WARPS * _WARP_SIZE, params)

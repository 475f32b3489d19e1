"""What the planner computes, in numpy: the exact oracle of sources/split_plan.cu."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cupy_kernels.decode import ITEM_INTS, ChunkRule, small_tiles
from cupy_kernels.shape import AttentionShape

IntArray = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

QUERY, ROW, KV_HEAD, FIRST_TILE, NUM_TILES, SEQ_LEN, PART, NUM_PARTS = range(ITEM_INTS)


def chunk_tiles(
    tiles: Int64Array, shape: AttentionShape, num_sms: int, capacity: int, rule: ChunkRule
) -> int:
    """Tiles per part for rows of `tiles` [n]."""
    heads = shape.num_kv_heads
    work = int(tiles.sum()) * heads
    splits = num_sms if work <= small_tiles(shape) else 2 * num_sms
    wanted = min(max(-(-work // splits), rule.min_tiles), rule.max_tiles)
    return max(wanted, -(-work // (capacity - len(tiles) * heads)))


def split_plan(
    rows: IntArray,
    seq_lens: IntArray,
    shape: AttentionShape,
    num_sms: int,
    capacity: int,
    rule: ChunkRule,
) -> IntArray:
    """The work list [capacity, 8] of rows [n] with seq_lens [n]."""
    tiles = -(-seq_lens.astype(np.int64) // 16)
    chunk = chunk_tiles(tiles, shape, num_sms, capacity, rule)
    parts = np.where(tiles == 0, 0, np.maximum(1, (2 * tiles + chunk) // (2 * chunk)))
    longest = np.where(parts == 0, 0, -(-tiles // np.maximum(parts, 1)))
    items = np.zeros((capacity, ITEM_INTS), np.int32)
    count = 0
    for i in np.argsort(-longest, kind="stable"):
        for kv_head in range(shape.num_kv_heads):
            for part in range(parts[i]):
                begin = tiles[i] * part // parts[i]
                num_tiles = tiles[i] * (part + 1) // parts[i] - begin
                where = (i, rows[i], kv_head, begin, num_tiles)
                items[count] = (*where, seq_lens[i], part, parts[i])
                count += 1
    return items

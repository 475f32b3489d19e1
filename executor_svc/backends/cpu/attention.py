"""Paged attention on the CPU: one kernel for decode, chunked prefill and anything between.

A KV block holds, per layer and KV head, tiles of 16 tokens: keys as [head_dim][16], so that one
vector is one dimension of 16 tokens and scores need no sum across lanes, then values as
[16][head_dim]. One tile is one run of memory, 8 KB at head_dim 64.

Queries are scaled when they are gathered; those of one KV head and one query tile share every key
and value that is read. `shape` is (heads, kv_heads, head_dim, tiles per block, elements per block).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import prange

from executor_svc.backends.cpu.jit import inlined, kernel, parallel_kernel
from executor_svc.backends.cpu.simd import (
    FloatArray,
    Vector,
    add,
    exp,
    fma,
    load,
    load_splat,
    max_lanes,
    maximum,
    mul,
    prefetch,
    splat,
    store,
    sum_lanes,
    zero,
)
from executor_svc.backends.cpu.work import (
    BEGIN,
    COUNT,
    END,
    PART,
    PARTIAL,
    POSITION,
    ROW,
    TILE,
    TOKEN,
)

IndexArray = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int32]

_PREFETCH_TILES = 2


@inlined
def _score_pair(
    pool: FloatArray, keys: int, ahead: int, queries: FloatArray, query: int, dim: int
) -> tuple[Vector, Vector]:
    """Scores of two queries against one tile of keys; prefetches the tile at `ahead` if >= 0."""
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    b0, b1, b2, b3 = zero(), zero(), zero(), zero()
    other = query + dim
    for d in range(0, dim, 4):
        at = keys + d * TILE
        if ahead >= 0:
            for line in range(4):
                prefetch(pool, ahead + (d + line) * TILE)
        key = load(pool, at)
        a0 = fma(load_splat(queries, query + d), key, a0)
        b0 = fma(load_splat(queries, other + d), key, b0)
        key = load(pool, at + 16)
        a1 = fma(load_splat(queries, query + d + 1), key, a1)
        b1 = fma(load_splat(queries, other + d + 1), key, b1)
        key = load(pool, at + 32)
        a2 = fma(load_splat(queries, query + d + 2), key, a2)
        b2 = fma(load_splat(queries, other + d + 2), key, b2)
        key = load(pool, at + 48)
        a3 = fma(load_splat(queries, query + d + 3), key, a3)
        b3 = fma(load_splat(queries, other + d + 3), key, b3)
    return add(add(a0, a1), add(a2, a3)), add(add(b0, b1), add(b2, b3))


@inlined
def _score_one(pool: FloatArray, keys: int, queries: FloatArray, query: int, dim: int) -> Vector:
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    for d in range(0, dim, 4):
        at = keys + d * TILE
        a0 = fma(load_splat(queries, query + d), load(pool, at), a0)
        a1 = fma(load_splat(queries, query + d + 1), load(pool, at + 16), a1)
        a2 = fma(load_splat(queries, query + d + 2), load(pool, at + 32), a2)
        a3 = fma(load_splat(queries, query + d + 3), load(pool, at + 48), a3)
    return add(add(a0, a1), add(a2, a3))


@inlined
def _soften(
    scores: FloatArray, first: int, visible: int, num_tiles: int, last_max: np.float32
) -> tuple[np.float32, np.float32]:
    """Turn a query's scores into weights exp(score - max) in place, 0 past `visible`.

    Returns the running maximum, the span's included, and the sum of the span's weights.
    """
    for t in range(max(visible, 0), num_tiles * TILE):
        scores[first + t] = -np.inf
    highest = splat(last_max)
    for tile in range(num_tiles):
        highest = maximum(load(scores, first + tile * TILE), highest)
    new_max = max_lanes(highest)
    offset = splat(-new_max)
    for tile in range(num_tiles):
        at = first + tile * TILE
        store(scores, at, exp(add(load(scores, at), offset)))
    for t in range(max(visible, 0), num_tiles * TILE):
        scores[first + t] = 0
    total = zero()
    for tile in range(num_tiles):
        total = add(total, load(scores, first + tile * TILE))
    return new_max, sum_lanes(total)


@inlined
def _weigh_pair(
    pool: FloatArray,
    values: int,
    ahead: int,
    num_tokens: int,
    weights: FloatArray,
    w: int,
    sums: FloatArray,
    s: int,
    dim: int,
) -> None:
    """Add 64 columns of a tile of values, weighted, to two queries' sums at s and s + dim."""
    r = s + dim
    a0, a1, a2, a3 = load(sums, s), load(sums, s + 16), load(sums, s + 32), load(sums, s + 48)
    b0, b1, b2, b3 = load(sums, r), load(sums, r + 16), load(sums, r + 32), load(sums, r + 48)
    for t in range(num_tokens):
        at = values + t * dim
        if ahead >= 0:
            for line in range(4):
                prefetch(pool, ahead + t * dim + line * TILE)
        weight, other = load_splat(weights, w + t), load_splat(weights, w + PART + t)
        value = load(pool, at)
        a0, b0 = fma(weight, value, a0), fma(other, value, b0)
        value = load(pool, at + 16)
        a1, b1 = fma(weight, value, a1), fma(other, value, b1)
        value = load(pool, at + 32)
        a2, b2 = fma(weight, value, a2), fma(other, value, b2)
        value = load(pool, at + 48)
        a3, b3 = fma(weight, value, a3), fma(other, value, b3)
    store(sums, s, a0)
    store(sums, s + 16, a1)
    store(sums, s + 32, a2)
    store(sums, s + 48, a3)
    store(sums, r, b0)
    store(sums, r + 16, b1)
    store(sums, r + 32, b2)
    store(sums, r + 48, b3)


@inlined
def _weigh_one(
    pool: FloatArray,
    values: int,
    num_tokens: int,
    weights: FloatArray,
    w: int,
    sums: FloatArray,
    s: int,
    dim: int,
) -> None:
    """Add 32 columns of a tile of values, weighted, to one query's sums at s."""
    a0, a1 = load(sums, s), load(sums, s + 16)
    for t in range(num_tokens):
        at = values + t * dim
        weight = load_splat(weights, w + t)
        a0 = fma(weight, load(pool, at), a0)
        a1 = fma(weight, load(pool, at + 16), a1)
    store(sums, s, a0)
    store(sums, s + 16, a1)


@inlined
def _tile_address(table: IntArray, tile: int, head_offset: int, shape: IndexArray) -> int:
    tiles_per_block = shape[3]
    block = np.int64(table[tile // tiles_per_block])
    return block * shape[4] + head_offset + tile % tiles_per_block * (2 * TILE * shape[2])


@inlined
def _score_span(
    pool: FloatArray,
    table: IntArray,
    head_offset: int,
    shape: IndexArray,
    first_tile: int,
    num_tiles: int,
    queries: FloatArray,
    scores: FloatArray,
    num_queries: int,
) -> None:
    dim = shape[2]
    for tile in range(num_tiles):
        keys = _tile_address(table, first_tile + tile, head_offset, shape)
        ahead = min(tile + _PREFETCH_TILES, num_tiles - 1)
        next_keys = _tile_address(table, first_tile + ahead, head_offset, shape)
        for j in range(0, num_queries - 1, 2):
            one, other = _score_pair(pool, keys, next_keys if j == 0 else -1, queries, j * dim, dim)
            store(scores, j * PART + tile * TILE, one)
            store(scores, (j + 1) * PART + tile * TILE, other)
        if num_queries % 2:
            j = num_queries - 1
            store(scores, j * PART + tile * TILE, _score_one(pool, keys, queries, j * dim, dim))


@inlined
def _weigh_span(
    pool: FloatArray,
    table: IntArray,
    head_offset: int,
    shape: IndexArray,
    first_tile: int,
    num_tokens: int,
    scores: FloatArray,
    sums: FloatArray,
    num_queries: int,
) -> None:
    dim = shape[2]
    num_tiles = (num_tokens + TILE - 1) // TILE
    for tile in range(num_tiles):
        values = _tile_address(table, first_tile + tile, head_offset, shape) + TILE * dim
        ahead = min(tile + _PREFETCH_TILES, num_tiles - 1)
        next_values = _tile_address(table, first_tile + ahead, head_offset, shape) + TILE * dim
        used = min(TILE, num_tokens - tile * TILE)
        in_pairs = num_queries // 2 * 2 if dim % 64 == 0 else 0
        for j in range(0, in_pairs, 2):
            for column in range(0, dim, 64):
                _weigh_pair(
                    pool,
                    values + column,
                    next_values + column if j == 0 else -1,
                    used,
                    scores,
                    j * PART + tile * TILE,
                    sums,
                    j * dim + column,
                    dim,
                )
        for j in range(in_pairs, num_queries):
            for column in range(0, dim, 32):
                _weigh_one(
                    pool,
                    values + column,
                    used,
                    scores,
                    j * PART + tile * TILE,
                    sums,
                    j * dim + column,
                    dim,
                )


@inlined
def _gather_queries(
    qkv: FloatArray, item: IndexArray, kv_head: int, shape: IndexArray, queries: FloatArray
) -> int:
    """Copy the item's queries of one KV head, scaled, token by token; returns how many."""
    num_heads, num_kv_heads, dim = shape[0], shape[1], shape[2]
    group = num_heads // num_kv_heads
    scale = splat(np.float32(1.0 / np.sqrt(dim)))
    token_stride = (num_heads + 2 * num_kv_heads) * dim
    for t in range(item[COUNT]):
        source = (item[TOKEN] + t) * token_stride + kv_head * group * dim
        for offset in range(0, group * dim, TILE):
            store(queries, t * group * dim + offset, mul(load(qkv, source + offset), scale))
    return item[COUNT] * group


@inlined
def _attend_item(
    pool: FloatArray,
    table: IntArray,
    item: IndexArray,
    head_offset: int,
    shape: IndexArray,
    num_queries: int,
    queries: FloatArray,
    scores: FloatArray,
    sums: FloatArray,
    norms: FloatArray,
) -> None:
    """Weighted value sums [num_queries, dim]; norms [num_queries, 2] gets (max, weight sum)."""
    dim, group = shape[2], shape[0] // shape[1]
    for offset in range(0, num_queries * dim, TILE):
        store(sums, offset, zero())
    for j in range(num_queries):
        norms[j, 0] = -np.inf
        norms[j, 1] = 0
    for begin in range(item[BEGIN], item[END], PART):
        num_tokens = min(PART, item[END] - begin)
        num_tiles = (num_tokens + TILE - 1) // TILE
        first_tile = begin // TILE
        _score_span(
            pool, table, head_offset, shape, first_tile, num_tiles, queries, scores, num_queries
        )
        for j in range(num_queries):
            visible = item[POSITION] + j // group + 1 - begin
            last_max = norms[j, 0]
            visible = min(visible, num_tokens)
            new_max, total = _soften(scores, j * PART, visible, num_tiles, last_max)
            norms[j, 0] = new_max
            if last_max < new_max and begin > item[BEGIN]:
                faded = np.exp(last_max - new_max)
                norms[j, 1] *= faded
                for offset in range(j * dim, (j + 1) * dim, TILE):
                    store(sums, offset, mul(load(sums, offset), splat(faded)))
            norms[j, 1] += total
        _weigh_span(
            pool, table, head_offset, shape, first_tile, num_tokens, scores, sums, num_queries
        )


@inlined
def _emit(
    item: IndexArray,
    kv_head: int,
    shape: IndexArray,
    num_queries: int,
    sums: FloatArray,
    norms: FloatArray,
    out: FloatArray,
    partials: FloatArray,
) -> None:
    num_heads, num_kv_heads, dim = shape[0], shape[1], shape[2]
    group = num_heads // num_kv_heads
    for j in range(num_queries):
        head = kv_head * group + j % group
        if item[PARTIAL] >= 0:
            target = (item[PARTIAL] * num_heads + head) * (dim + 2)
            for d in range(dim):
                partials[target + d] = sums[j * dim + d]
            partials[target + dim] = norms[j, 0]
            partials[target + dim + 1] = norms[j, 1]
        else:
            target = ((item[TOKEN] + j // group) * num_heads + head) * dim
            scale = splat(np.float32(1) / norms[j, 1])
            for offset in range(0, dim, TILE):
                store(out, target + offset, mul(load(sums, j * dim + offset), scale))


@parallel_kernel
def attend(
    qkv: FloatArray,
    pool: FloatArray,
    block_table: IntArray,
    items: IndexArray,
    begins: IndexArray,
    layer: int,
    shape: IndexArray,
    max_queries: int,
    out: FloatArray,
    partials: FloatArray,
) -> None:
    """Run all items of one layer.

    Args:
        qkv: [T * (heads + 2 * kv_heads) * head_dim], rotated.
        pool: all blocks, flat.
        block_table: [max_rows, max_blocks_per_row].
        items, begins: from plan_items.
        layer: whose slots to read.
        shape: see the module.
        max_queries: most queries of one KV head in an item.
        out: [T * heads * head_dim], written except for merged tokens.
        partials: [num_partials * heads * (head_dim + 2)], for `merge`.
    """
    for thread in prange(begins.size - 1):
        num_kv_heads, dim = shape[1], shape[2]
        queries = np.empty(max_queries * dim, np.float32)
        scores = np.empty(max_queries * PART, np.float32)
        sums = np.empty(max_queries * dim, np.float32)
        norms = np.empty((max_queries, 2), np.float32)
        for unit in range(begins[thread], begins[thread + 1]):
            item = items[unit // num_kv_heads]
            kv_head = unit % num_kv_heads
            head_offset = (layer * num_kv_heads + kv_head) * shape[3] * 2 * TILE * dim
            num_queries = _gather_queries(qkv, item, kv_head, shape, queries)
            table = block_table[item[ROW]]
            _attend_item(
                pool, table, item, head_offset, shape, num_queries, queries, scores, sums, norms
            )
            _emit(item, kv_head, shape, num_queries, sums, norms, out, partials)


@kernel
def merge(merges: IndexArray, partials: FloatArray, shape: IndexArray, out: FloatArray) -> None:
    """Combine the parts of each token in merges [m, 3], in context order, into `out`."""
    num_heads, dim = shape[0], shape[2]
    for m in range(len(merges)):
        token, first, count = merges[m]
        for head in range(num_heads):
            begin = (first * num_heads + head) * (dim + 2)
            stride = num_heads * (dim + 2)
            highest = np.float32(-np.inf)
            for part in range(count):
                highest = max(highest, partials[begin + part * stride + dim])
            target = (token * num_heads + head) * dim
            out[target : target + dim] = 0
            total = np.float32(0)
            for part in range(count):
                source = begin + part * stride
                factor = np.exp(partials[source + dim] - highest)
                total += factor * partials[source + dim + 1]
                for d in range(dim):
                    out[target + d] += factor * partials[source + d]
            for d in range(dim):
                out[target + d] /= total

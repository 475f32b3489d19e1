"""Inner loops of attention: queries against 16-token tiles of keys and values.

Two queries at a time share every vector that is loaded; all sums stay in registers. The tile after
next is prefetched, because blocks lie anywhere in the pool and no hardware prefetcher can guess.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor_svc.backends.cpu.jit import inlined
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
    prefetch,
    splat,
    store,
    sum_lanes,
    zero,
)
from executor_svc.backends.cpu.work import PART, TILE

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
def soften(
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
    tiles_per_block = int(shape[3])
    block = int(table[tile // tiles_per_block])
    within = tile % tiles_per_block * 2 * TILE * int(shape[2])
    return block * int(shape[4]) + head_offset + within


@inlined
def score_span(
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
    """Scores [num_queries, PART] of queries [num_queries, dim] against a span of tiles."""
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
def weigh_span(
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
    """Add a span's values, weighted by scores [num_queries, PART], to sums [num_queries, dim]."""
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

"""Inner loops of attention: queries against a span of eight 16-token tiles of keys and values.

Three queries at a time share every vector that is loaded; all sums stay in registers.

Blocks lie anywhere in the pool, so a tile is a short run of memory in an unforeseen place: it is
over before its address is translated and the hardware has learned to read ahead. Tiles read one
after the other come at a quarter of the bandwidth of a plain read, however early software
prefetches their lines. Therefore all tiles of a span are read in lock step, a line of each in
turn: the delays overlap, and the hardware reads ahead in eight places at once. Between the two
passes of a span nothing would be read, so with each line one of the next pass is prefetched: of
the values while keys are read, of the next span's keys while values are. Only a span's first
queries do so; the others find everything in the cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor_svc.backends.cpu.jit import inlined
from executor_svc.backends.cpu.simd import (
    FloatArray,
    Vector,
    add,
    any_above,
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
    zero,
)
from executor_svc.backends.cpu.work import TILE

IndexArray = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int32]
Four = tuple[Vector, Vector, Vector, Vector]
Eight = tuple[Vector, Vector, Vector, Vector, Vector, Vector, Vector, Vector]

SPAN_TILES = 8
"""Tiles read in lock step."""
SPAN = SPAN_TILES * TILE
"""Context tokens scored at once."""


@inlined
def locate_span(
    table: IntArray,
    begin: int,
    num_tokens: int,
    head_offset: int,
    shape: IndexArray,
    tiles: IndexArray,
) -> None:
    """Fill tiles [SPAN_TILES] with the addresses of the tiles that hold tokens from `begin` on.

    Where num_tokens fill fewer tiles the last one is repeated, so that it can be read in lock
    step all the same.
    """
    tiles_per_block, tile_elements = shape[3], 2 * TILE * shape[2]
    block, within = divmod(begin // TILE, tiles_per_block)
    last = (num_tokens - 1) // TILE
    for i in range(SPAN_TILES):
        tiles[i] = table[block] * shape[4] + head_offset + within * tile_elements
        if i < last:
            within += 1
            if within == tiles_per_block:
                block, within = block + 1, 0


@inlined
def _zeros() -> Eight:
    return zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()


@inlined
def _load_four(array: FloatArray, at: int) -> Four:
    return load(array, at), load(array, at + 16), load(array, at + 32), load(array, at + 48)


@inlined
def _store_four(array: FloatArray, at: int, v0: Vector, v1: Vector, v2: Vector, v3: Vector) -> None:
    store(array, at, v0)
    store(array, at + 16, v1)
    store(array, at + 32, v2)
    store(array, at + 48, v3)


@inlined
def _prefetch_four(pool: FloatArray, at: int) -> None:
    for offset in range(0, 4 * TILE, TILE):
        prefetch(pool, at + offset)


@inlined
def _prefetch_eight(pool: FloatArray, tiles: IndexArray, offset: int) -> None:
    """One line of each tile."""
    for i in range(SPAN_TILES):
        prefetch(pool, tiles[i] + offset)


@inlined
def _score_three(
    pool: FloatArray, tiles: IndexArray, queries: FloatArray, j: int, dim: int, scores: FloatArray
) -> None:
    """Scores of the queries j, j + 1 and j + 2, to their places."""
    q, at = j * dim, j * SPAN
    values = dim * TILE
    k0, k1, k2, k3 = tiles[0], tiles[1], tiles[2], tiles[3]
    k4, k5, k6, k7 = tiles[4], tiles[5], tiles[6], tiles[7]
    a0, a1, a2, a3, a4, a5, a6, a7 = _zeros()
    b0, b1, b2, b3, b4, b5, b6, b7 = _zeros()
    c0, c1, c2, c3, c4, c5, c6, c7 = _zeros()
    for d in range(dim):
        if j == 0:
            _prefetch_eight(pool, tiles, values + d * TILE)
        a = load_splat(queries, q + d)
        b = load_splat(queries, q + dim + d)
        c = load_splat(queries, q + 2 * dim + d)
        key = load(pool, k0 + d * TILE)
        a0, b0, c0 = fma(a, key, a0), fma(b, key, b0), fma(c, key, c0)
        key = load(pool, k1 + d * TILE)
        a1, b1, c1 = fma(a, key, a1), fma(b, key, b1), fma(c, key, c1)
        key = load(pool, k2 + d * TILE)
        a2, b2, c2 = fma(a, key, a2), fma(b, key, b2), fma(c, key, c2)
        key = load(pool, k3 + d * TILE)
        a3, b3, c3 = fma(a, key, a3), fma(b, key, b3), fma(c, key, c3)
        key = load(pool, k4 + d * TILE)
        a4, b4, c4 = fma(a, key, a4), fma(b, key, b4), fma(c, key, c4)
        key = load(pool, k5 + d * TILE)
        a5, b5, c5 = fma(a, key, a5), fma(b, key, b5), fma(c, key, c5)
        key = load(pool, k6 + d * TILE)
        a6, b6, c6 = fma(a, key, a6), fma(b, key, b6), fma(c, key, c6)
        key = load(pool, k7 + d * TILE)
        a7, b7, c7 = fma(a, key, a7), fma(b, key, b7), fma(c, key, c7)
    _store_four(scores, at, a0, a1, a2, a3)
    _store_four(scores, at + 64, a4, a5, a6, a7)
    _store_four(scores, at + SPAN, b0, b1, b2, b3)
    _store_four(scores, at + SPAN + 64, b4, b5, b6, b7)
    _store_four(scores, at + 2 * SPAN, c0, c1, c2, c3)
    _store_four(scores, at + 2 * SPAN + 64, c4, c5, c6, c7)


@inlined
def _score_one(
    pool: FloatArray, tiles: IndexArray, queries: FloatArray, j: int, dim: int, scores: FloatArray
) -> None:
    q, at = j * dim, j * SPAN
    values = dim * TILE
    k0, k1, k2, k3 = tiles[0], tiles[1], tiles[2], tiles[3]
    k4, k5, k6, k7 = tiles[4], tiles[5], tiles[6], tiles[7]
    a0, a1, a2, a3, a4, a5, a6, a7 = _zeros()
    for d in range(dim):
        if j == 0:
            _prefetch_eight(pool, tiles, values + d * TILE)
        a = load_splat(queries, q + d)
        a0 = fma(a, load(pool, k0 + d * TILE), a0)
        a1 = fma(a, load(pool, k1 + d * TILE), a1)
        a2 = fma(a, load(pool, k2 + d * TILE), a2)
        a3 = fma(a, load(pool, k3 + d * TILE), a3)
        a4 = fma(a, load(pool, k4 + d * TILE), a4)
        a5 = fma(a, load(pool, k5 + d * TILE), a5)
        a6 = fma(a, load(pool, k6 + d * TILE), a6)
        a7 = fma(a, load(pool, k7 + d * TILE), a7)
    _store_four(scores, at, a0, a1, a2, a3)
    _store_four(scores, at + 64, a4, a5, a6, a7)


@inlined
def score_span(
    pool: FloatArray,
    tiles: IndexArray,
    queries: FloatArray,
    num_queries: int,
    dim: int,
    scores: FloatArray,
) -> None:
    """Scores [num_queries, SPAN] of queries [num_queries, dim] against the tiles' keys.

    Prefetches the tiles' values meanwhile.
    """
    threes = num_queries // 3 * 3
    for j in range(0, threes, 3):
        _score_three(pool, tiles, queries, j, dim, scores)
    for j in range(threes, num_queries):
        _score_one(pool, tiles, queries, j, dim, scores)


@inlined
def soften(
    scores: FloatArray,
    j: int,
    visible: int,
    num_tokens: int,
    dim: int,
    maxima: FloatArray,
    totals: FloatArray,
    sums: FloatArray,
) -> None:
    """Turn query j's scores into weights exp(score - maximum) in place, 0 past `visible`.

    Only the tiles that num_tokens fill are looked at.
    Keeps its running maximum, the sum of its weights (totals [num_queries, TILE], one for each
    lane) and, in step with the maximum, its weighted values (sums [num_queries, dim]).
    """
    first, total = j * SPAN, j * TILE
    num_scores = (num_tokens + TILE - 1) // TILE * TILE
    for t in range(max(visible, 0), num_scores):
        scores[first + t] = -np.inf
    last_max = splat(maxima[j])
    highest = last_max
    for i in range(0, num_scores, TILE):
        highest = maximum(load(scores, first + i), highest)
    if any_above(highest, last_max):
        faded = exp(splat(maxima[j] - max_lanes(highest)))
        maxima[j] = max_lanes(highest)
        store(totals, total, mul(load(totals, total), faded))
        for at in range(j * dim, (j + 1) * dim, TILE):
            store(sums, at, mul(load(sums, at), faded))
    offset = splat(-maxima[j])
    weight_sum = load(totals, total)
    for i in range(0, num_scores, TILE):
        weights = exp(add(load(scores, first + i), offset))
        store(scores, first + i, weights)
        weight_sum = add(weight_sum, weights)
    store(totals, total, weight_sum)
    # exp is never 0: too little to be seen in the total, but a value may be NaN.
    for t in range(max(visible, 0), num_scores):
        scores[first + t] = 0


@inlined
def _weigh_three(
    pool: FloatArray,
    tiles: IndexArray,
    upcoming: IndexArray,
    column: int,
    num_tokens: int,
    weights: FloatArray,
    j: int,
    sums: FloatArray,
    dim: int,
) -> None:
    """Add 64 columns of the values, weighted, to the sums of queries j, j + 1 and j + 2."""
    whole, rest = num_tokens // TILE, num_tokens % TILE
    r, s, u = j * dim + column, (j + 1) * dim + column, (j + 2) * dim + column
    a0, a1, a2, a3 = _load_four(sums, r)
    b0, b1, b2, b3 = _load_four(sums, s)
    c0, c1, c2, c3 = _load_four(sums, u)
    for t in range(TILE):
        for i in range(whole + (t < rest)):
            at = tiles[i] + (TILE + t) * dim + column
            if j == 0:
                _prefetch_four(pool, upcoming[i] + t * dim + column)
            w = j * SPAN + i * TILE + t
            a = load_splat(weights, w)
            b = load_splat(weights, w + SPAN)
            c = load_splat(weights, w + 2 * SPAN)
            value = load(pool, at)
            a0, b0, c0 = fma(a, value, a0), fma(b, value, b0), fma(c, value, c0)
            value = load(pool, at + 16)
            a1, b1, c1 = fma(a, value, a1), fma(b, value, b1), fma(c, value, c1)
            value = load(pool, at + 32)
            a2, b2, c2 = fma(a, value, a2), fma(b, value, b2), fma(c, value, c2)
            value = load(pool, at + 48)
            a3, b3, c3 = fma(a, value, a3), fma(b, value, b3), fma(c, value, c3)
    _store_four(sums, r, a0, a1, a2, a3)
    _store_four(sums, s, b0, b1, b2, b3)
    _store_four(sums, u, c0, c1, c2, c3)


@inlined
def _weigh_one(
    pool: FloatArray,
    tiles: IndexArray,
    upcoming: IndexArray,
    column: int,
    num_tokens: int,
    weights: FloatArray,
    j: int,
    sums: FloatArray,
    dim: int,
) -> None:
    """Add 64 columns of the values, weighted, to query j's sums."""
    whole, rest = num_tokens // TILE, num_tokens % TILE
    s = j * dim + column
    a0, a1, a2, a3 = _load_four(sums, s)
    for t in range(TILE):
        for i in range(whole + (t < rest)):
            at = tiles[i] + (TILE + t) * dim + column
            if j == 0:
                _prefetch_four(pool, upcoming[i] + t * dim + column)
            weight = load_splat(weights, j * SPAN + i * TILE + t)
            a0 = fma(weight, load(pool, at), a0)
            a1 = fma(weight, load(pool, at + 16), a1)
            a2 = fma(weight, load(pool, at + 32), a2)
            a3 = fma(weight, load(pool, at + 48), a3)
    _store_four(sums, s, a0, a1, a2, a3)


@inlined
def _weigh_narrow(
    pool: FloatArray,
    tiles: IndexArray,
    upcoming: IndexArray,
    column: int,
    num_tokens: int,
    weights: FloatArray,
    j: int,
    sums: FloatArray,
    dim: int,
) -> None:
    """Add 32 columns of the values, weighted, to query j's sums."""
    whole, rest = num_tokens // TILE, num_tokens % TILE
    s = j * dim + column
    a0, a1 = load(sums, s), load(sums, s + 16)
    for t in range(TILE):
        for i in range(whole + (t < rest)):
            at = tiles[i] + (TILE + t) * dim + column
            if j == 0:
                prefetch(pool, upcoming[i] + t * dim + column)
                prefetch(pool, upcoming[i] + t * dim + column + 16)
            weight = load_splat(weights, j * SPAN + i * TILE + t)
            a0 = fma(weight, load(pool, at), a0)
            a1 = fma(weight, load(pool, at + 16), a1)
    store(sums, s, a0)
    store(sums, s + 16, a1)


@inlined
def weigh_span(
    pool: FloatArray,
    tiles: IndexArray,
    upcoming: IndexArray,
    num_tokens: int,
    weights: FloatArray,
    num_queries: int,
    dim: int,
    sums: FloatArray,
) -> None:
    """Add the first num_tokens values, weighted by [num_queries, SPAN], to sums.

    Prefetches the keys of the tiles in `upcoming` meanwhile.
    Values further on are not read: nobody may have written them.
    """
    threes = num_queries // 3 * 3
    wide = dim // 64 * 64
    for column in range(0, wide, 64):
        for j in range(0, threes, 3):
            _weigh_three(pool, tiles, upcoming, column, num_tokens, weights, j, sums, dim)
        for j in range(threes, num_queries):
            _weigh_one(pool, tiles, upcoming, column, num_tokens, weights, j, sums, dim)
    for column in range(wide, dim, 32):
        for j in range(num_queries):
            _weigh_narrow(pool, tiles, upcoming, column, num_tokens, weights, j, sums, dim)

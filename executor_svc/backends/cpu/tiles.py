"""Inner loops of attention: queries against 16-token tiles of keys and values.

Two queries at a time share every vector that is loaded; all sums stay in registers. Blocks lie
anywhere in the pool, where no hardware prefetcher can guess, so every pass over a tile prefetches
its share of the next one: a core can wait for some 20 cache lines at once, and lines asked for in
one go would stall the pass instead of arriving behind it.
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

_LINES = 4
"""Cache lines of a tile that are prefetched beside 64 elements, by all passes together."""


@inlined
def _prefetch_lines(pool: FloatArray, at: int, num_lines: int) -> None:
    if num_lines > 0:
        prefetch(pool, at)
    if num_lines > 1:
        prefetch(pool, at + TILE)
    if num_lines > 2:
        prefetch(pool, at + 2 * TILE)
        prefetch(pool, at + 3 * TILE)


@inlined
def _score_pair(
    pool: FloatArray,
    keys: int,
    ahead: int,
    num_lines: int,
    queries: FloatArray,
    query: int,
    dim: int,
) -> tuple[Vector, Vector]:
    """Scores of the queries at `query` and `query + dim` against one tile of keys."""
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    b0, b1, b2, b3 = zero(), zero(), zero(), zero()
    other = query + dim
    for d in range(0, dim, 4):
        at = keys + d * TILE
        _prefetch_lines(pool, ahead + d * TILE, num_lines)
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
def _score_one(
    pool: FloatArray,
    keys: int,
    ahead: int,
    num_lines: int,
    queries: FloatArray,
    query: int,
    dim: int,
) -> Vector:
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    for d in range(0, dim, 4):
        at = keys + d * TILE
        _prefetch_lines(pool, ahead + d * TILE, num_lines)
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
    num_lines: int,
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
        _prefetch_lines(pool, ahead + t * dim, num_lines)
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
    ahead: int,
    num_lines: int,
    num_tokens: int,
    weights: FloatArray,
    w: int,
    sums: FloatArray,
    s: int,
    dim: int,
) -> None:
    """Add 64 columns of a tile of values, weighted, to one query's sums at s."""
    a0, a1, a2, a3 = load(sums, s), load(sums, s + 16), load(sums, s + 32), load(sums, s + 48)
    for t in range(num_tokens):
        at = values + t * dim
        _prefetch_lines(pool, ahead + t * dim, num_lines)
        weight = load_splat(weights, w + t)
        a0 = fma(weight, load(pool, at), a0)
        a1 = fma(weight, load(pool, at + 16), a1)
        a2 = fma(weight, load(pool, at + 32), a2)
        a3 = fma(weight, load(pool, at + 48), a3)
    store(sums, s, a0)
    store(sums, s + 16, a1)
    store(sums, s + 32, a2)
    store(sums, s + 48, a3)


@inlined
def _weigh_narrow(
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
    """Where the keys of a tile begin; its values follow."""
    tiles_per_block = int(shape[3])
    block = int(table[tile // tiles_per_block])
    within = tile % tiles_per_block * 2 * TILE * int(shape[2])
    return block * int(shape[4]) + head_offset + within


@inlined
def _lines_per_pass(num_queries: int) -> int:
    return max(1, _LINES // ((num_queries + 1) // 2))


@inlined
def _lines_of_pass(j: int, lines_per_pass: int) -> int:
    """How many lines the pass for query j prefetches; those of earlier passes come before."""
    return lines_per_pass if j // 2 * lines_per_pass < _LINES else 0


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
    """Scores [num_queries, PART] of queries [num_queries, dim] against a span of tiles.

    At its end prefetches the first values, which weigh_span will read.
    """
    dim = int(shape[2])
    per_pass = _lines_per_pass(num_queries)
    for tile in range(num_tiles):
        keys = _tile_address(table, first_tile + tile, head_offset, shape)
        ahead, target = tile + 1, head_offset
        if ahead == num_tiles:
            ahead, target = 0, head_offset + TILE * dim
        later = _tile_address(table, first_tile + ahead, target, shape)
        for j in range(0, num_queries, 2):
            num_lines = _lines_of_pass(j, per_pass)
            lines = later + j // 2 * per_pass * TILE
            at = j * PART + tile * TILE
            if j + 1 < num_queries:
                one, other = _score_pair(pool, keys, lines, num_lines, queries, j * dim, dim)
                store(scores, at, one)
                store(scores, at + PART, other)
            else:
                store(scores, at, _score_one(pool, keys, lines, num_lines, queries, j * dim, dim))


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
    """Add a span's values, weighted by scores [num_queries, PART], to sums [num_queries, dim].

    At its end prefetches the first keys of the next KV head, which is mostly next in line.
    """
    dim = int(shape[2])
    num_tiles = (num_tokens + TILE - 1) // TILE
    per_pass = _lines_per_pass(num_queries)
    next_head = head_offset + int(shape[3]) * 2 * TILE * dim
    for tile in range(num_tiles):
        values = _tile_address(table, first_tile + tile, head_offset, shape) + TILE * dim
        ahead, target = tile + 1, head_offset + TILE * dim
        if ahead == num_tiles:
            ahead, target = 0, next_head
        later = _tile_address(table, first_tile + ahead, target, shape)
        used = min(TILE, num_tokens - tile * TILE)
        for column in range(0, dim // 64 * 64, 64):
            for j in range(0, num_queries, 2):
                num_lines = _lines_of_pass(j, per_pass)
                lines = later + column + j // 2 * per_pass * TILE
                w, s, v = j * PART + tile * TILE, j * dim + column, values + column
                if j + 1 < num_queries:
                    _weigh_pair(pool, v, lines, num_lines, used, scores, w, sums, s, dim)
                else:
                    _weigh_one(pool, v, lines, num_lines, used, scores, w, sums, s, dim)
        for column in range(dim // 64 * 64, dim, 32):
            for j in range(num_queries):
                w, s = j * PART + tile * TILE, j * dim + column
                _weigh_narrow(pool, values + column, used, scores, w, sums, s, dim)

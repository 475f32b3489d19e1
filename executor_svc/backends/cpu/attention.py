"""Paged attention on the CPU: one kernel for decode, chunked prefill and anything between.

A KV block holds, per layer and KV head, tiles of 16 tokens: keys as [head_dim][16], so that one
vector is one dimension of 16 tokens and scores need no sum across lanes, then values as
[16][head_dim]. One tile is one run of memory, 8 KB at head_dim 64.

Queries are scaled when they are gathered; those of one KV head and one query tile share every key
and value that is read. `shape` is (heads, kv_heads, head_dim, tiles per block, elements per block).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import prange

from executor_svc.backends.cpu.jit import inlined, parallel_kernel
from executor_svc.backends.cpu.simd import FloatArray, fma, load, mul, splat, store, sum_lanes
from executor_svc.backends.cpu.tiles import (
    SPAN,
    SPAN_TILES,
    locate_span,
    score_span,
    soften,
    weigh_span,
)
from executor_svc.backends.cpu.work import (
    BEGIN,
    COUNT,
    END,
    PARTIAL,
    POSITION,
    ROW,
    TILE,
    TOKEN,
)

IndexArray = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int32]


class Scratch(NamedTuple):
    """What one thread works in, for up to max_queries queries of one KV head; all arrays flat."""

    queries: FloatArray  # [max_queries, dim]
    scores: FloatArray  # [max_queries, SPAN], then weights
    sums: FloatArray  # [max_queries, dim]
    maxima: FloatArray  # [max_queries]
    totals: FloatArray  # [max_queries, TILE]
    tiles: IndexArray  # [SPAN_TILES], the span at hand
    upcoming: IndexArray  # [SPAN_TILES], the span whose keys are prefetched meanwhile


@inlined
def _new_scratch(max_queries: int, dim: int) -> Scratch:
    return Scratch(
        np.empty(max_queries * dim, np.float32),
        np.empty(max_queries * SPAN, np.float32),
        np.empty(max_queries * dim, np.float32),
        np.empty(max_queries, np.float32),
        np.empty(max_queries * TILE, np.float32),
        np.empty(SPAN_TILES, np.int64),
        np.empty(SPAN_TILES, np.int64),
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
    return int(item[COUNT]) * int(group)


@inlined
def _locate(
    block_table: IntArray,
    items: IndexArray,
    unit: int,
    begin: int,
    layer: int,
    shape: IndexArray,
    tiles: IndexArray,
) -> None:
    """Fill in the addresses of a unit's tiles from context token `begin` on."""
    num_kv_heads = shape[1]
    item, kv_head = items[unit // num_kv_heads], unit % num_kv_heads
    head_offset = (layer * num_kv_heads + kv_head) * shape[3] * 2 * TILE * shape[2]
    num_tokens = min(SPAN, item[END] - begin)
    locate_span(block_table[item[ROW]], begin, num_tokens, head_offset, shape, tiles)


@inlined
def _attend_unit(
    pool: FloatArray,
    block_table: IntArray,
    items: IndexArray,
    unit: int,
    last_unit: int,
    layer: int,
    shape: IndexArray,
    num_queries: int,
    scratch: Scratch,
) -> None:
    """Sums of weighted values, maxima and totals as in tiles.soften.

    Takes the addresses of its first span from `upcoming` and leaves there those of the next
    unit's. After the thread's last unit it leaves its own: they are in the cache already.
    """
    item, dim, group = items[unit // shape[1]], shape[2], shape[0] // shape[1]
    scores, sums, maxima, totals = scratch.scores, scratch.sums, scratch.maxima, scratch.totals
    tiles, upcoming = scratch.tiles, scratch.upcoming
    sums[: num_queries * dim] = 0
    maxima[:num_queries] = -np.inf
    totals[: num_queries * TILE] = 0
    for begin in range(item[BEGIN], item[END], SPAN):
        num_tokens = min(SPAN, item[END] - begin)
        tiles[:] = upcoming
        if begin + SPAN < item[END]:
            _locate(block_table, items, unit, begin + SPAN, layer, shape, upcoming)
        elif unit < last_unit:
            first = items[(unit + 1) // shape[1]][BEGIN]
            _locate(block_table, items, unit + 1, first, layer, shape, upcoming)
        score_span(pool, tiles, scratch.queries, num_queries, dim, scores)
        for j in range(num_queries):
            visible = min(item[POSITION] + j // group + 1 - begin, num_tokens)
            soften(scores, j, visible, num_tokens, dim, maxima, totals, sums)
        weigh_span(pool, tiles, upcoming, num_tokens, scores, num_queries, dim, sums)


@inlined
def _emit(
    item: IndexArray,
    kv_head: int,
    shape: IndexArray,
    num_queries: int,
    scratch: Scratch,
    out: FloatArray,
    partials: FloatArray,
) -> None:
    sums, maxima, totals = scratch.sums, scratch.maxima, scratch.totals
    num_heads, num_kv_heads, dim = shape[0], shape[1], shape[2]
    group = num_heads // num_kv_heads
    for j in range(num_queries):
        head = kv_head * group + j % group
        if item[PARTIAL] >= 0:
            target = (item[PARTIAL] * num_heads + head) * (dim + 2)
            for offset in range(0, dim, TILE):
                store(partials, target + offset, load(sums, j * dim + offset))
            partials[target + dim] = maxima[j]
            partials[target + dim + 1] = sum_lanes(load(totals, j * TILE))
        else:
            target = ((item[TOKEN] + j // group) * num_heads + head) * dim
            scale = splat(np.float32(1) / sum_lanes(load(totals, j * TILE)))
            for offset in range(0, dim, TILE):
                store(out, target + offset, mul(load(sums, j * dim + offset), scale))


@inlined
def _merge(merges: IndexArray, partials: FloatArray, shape: IndexArray, out: FloatArray) -> None:
    """Combine the parts of each token in merges [m, 3], in context order, into `out`."""
    num_heads, dim = shape[0], shape[2]
    stride = num_heads * (dim + 2)
    for m in range(len(merges)):
        token, first, count = merges[m]
        for head in range(num_heads):
            begin = (first * num_heads + head) * (dim + 2)
            end = begin + count * stride
            highest = np.float32(-np.inf)
            for source in range(begin, end, stride):
                highest = max(highest, partials[source + dim])
            target = (token * num_heads + head) * dim
            out[target : target + dim] = 0
            total = np.float32(0)
            for source in range(begin, end, stride):
                factor = np.exp(partials[source + dim] - highest)
                total += factor * partials[source + dim + 1]
                for d in range(0, dim, TILE):
                    weighted = fma(splat(factor), load(partials, source + d), load(out, target + d))
                    store(out, target + d, weighted)
            scale = splat(np.float32(1) / total)
            for d in range(0, dim, TILE):
                store(out, target + d, mul(load(out, target + d), scale))


@parallel_kernel
def attend(
    qkv: FloatArray,
    pool: FloatArray,
    block_table: IntArray,
    items: IndexArray,
    merges: IndexArray,
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
        items, merges, begins: from plan_items.
        layer: whose slots to read.
        shape: see the module.
        max_queries: most queries of one KV head in an item.
        out: [T * heads * head_dim], written.
        partials: [num_partials * heads * (head_dim + 2)], scratch for the parts.
    """
    for thread in prange(begins.size - 1):
        num_kv_heads = shape[1]
        scratch = _new_scratch(max_queries, shape[2])
        first_unit, last_unit = begins[thread], begins[thread + 1] - 1
        if first_unit <= last_unit:
            begin = items[first_unit // num_kv_heads][BEGIN]
            _locate(block_table, items, first_unit, begin, layer, shape, scratch.upcoming)
        for unit in range(first_unit, last_unit + 1):
            item, kv_head = items[unit // num_kv_heads], unit % num_kv_heads
            count = _gather_queries(qkv, item, kv_head, shape, scratch.queries)
            _attend_unit(pool, block_table, items, unit, last_unit, layer, shape, count, scratch)
            _emit(item, kv_head, shape, count, scratch, out, partials)
    _merge(merges, partials, shape, out)

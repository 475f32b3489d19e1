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
    maxima: FloatArray,
    totals: FloatArray,
) -> None:
    """Weighted value sums [num_queries, dim]; maxima and totals as in tiles.soften."""
    dim, group = shape[2], shape[0] // shape[1]
    sums[: num_queries * dim] = 0
    maxima[:num_queries] = -np.inf
    totals[: num_queries * TILE] = 0
    tiles = np.empty(SPAN_TILES, np.int64)
    for begin in range(item[BEGIN], item[END], SPAN):
        num_tokens = min(SPAN, item[END] - begin)
        locate_span(table, begin, num_tokens, head_offset, shape, tiles)
        score_span(pool, tiles, queries, num_queries, dim, scores)
        for j in range(num_queries):
            visible = min(item[POSITION] + j // group + 1 - begin, num_tokens)
            soften(scores, j, visible, num_tokens, dim, maxima, totals, sums)
        weigh_span(pool, tiles, num_tokens, scores, num_queries, dim, sums)


@inlined
def _emit(
    item: IndexArray,
    kv_head: int,
    shape: IndexArray,
    num_queries: int,
    sums: FloatArray,
    maxima: FloatArray,
    totals: FloatArray,
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
        num_kv_heads, dim = shape[1], shape[2]
        queries = np.empty(max_queries * dim, np.float32)
        scores = np.empty(max_queries * SPAN, np.float32)
        sums = np.empty(max_queries * dim, np.float32)
        maxima = np.empty(max_queries, np.float32)
        totals = np.empty(max_queries * TILE, np.float32)
        for unit in range(begins[thread], begins[thread + 1]):
            item = items[unit // num_kv_heads]
            kv_head = unit % num_kv_heads
            head_offset = (layer * num_kv_heads + kv_head) * shape[3] * 2 * TILE * dim
            num_queries = _gather_queries(qkv, item, kv_head, shape, queries)
            table = block_table[item[ROW]]
            _attend_item(
                pool,
                table,
                item,
                head_offset,
                shape,
                num_queries,
                queries,
                scores,
                sums,
                maxima,
                totals,
            )
            _emit(item, kv_head, shape, num_queries, sums, maxima, totals, out, partials)
    _merge(merges, partials, shape, out)

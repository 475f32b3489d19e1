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
from executor_svc.backends.cpu.simd import FloatArray, load, mul, splat, store, zero
from executor_svc.backends.cpu.tiles import score_span, soften, weigh_span
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
        score_span(
            pool, table, head_offset, shape, first_tile, num_tiles, queries, scores, num_queries
        )
        for j in range(num_queries):
            visible = item[POSITION] + j // group + 1 - begin
            last_max = norms[j, 0]
            visible = min(visible, num_tokens)
            new_max, total = soften(scores, j * PART, visible, num_tiles, last_max)
            norms[j, 0] = new_max
            if last_max < new_max and begin > item[BEGIN]:
                faded = np.exp(last_max - new_max)
                norms[j, 1] *= faded
                for offset in range(j * dim, (j + 1) * dim, TILE):
                    store(sums, offset, mul(load(sums, offset), splat(faded)))
            norms[j, 1] += total
        weigh_span(
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

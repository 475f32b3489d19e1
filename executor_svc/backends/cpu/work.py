"""How the attention of one step is cut into work for the threads.

The work is a list of items, the same for every layer: a tile of queries of one row (several tokens
in prefill, one in decode) over a span of its context. Long decode contexts are cut into parts of
fixed length that are merged afterwards, so a row's result never depends on its batch. Threads get
runs of (item, KV head) of equal estimated cost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor_svc.backends.cpu.jit import inlined, kernel

IndexArray = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int32]

TILE = 16
"""Tokens whose keys one vector spans."""
PART = 256
"""Context tokens of a decode part."""

# Columns of an item: its first token in the step, number of tokens, executor row, position of the
# first token, context span [BEGIN, END), and where a part's result goes (-1: it is the whole).
TOKEN, COUNT, ROW, POSITION, BEGIN, END, PARTIAL = range(7)


@kernel
def plan_items(
    rows: IndexArray,
    num_scheduled: IndexArray,
    num_computed: IndexArray,
    query_tile: int,
    num_kv_heads: int,
    num_threads: int,
) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Cut a step's rows [num_rows] into work.

    Returns items [n, 7]; merges [m, 3] (token, first partial, number of partials); and the units
    (item * num_kv_heads + kv_head) at which each thread begins, [num_threads + 1].
    """
    num_items = num_merges = 0
    for i in range(rows.size):
        if num_scheduled[i] == 1:
            num_parts = num_computed[i] // PART + 1
            num_items += num_parts
            num_merges += num_parts > 1
        else:
            num_items += (num_scheduled[i] + query_tile - 1) // query_tile
    items = np.empty((num_items, 7), np.int64)
    merges = np.empty((num_merges, 3), np.int64)
    costs = np.empty(num_items, np.float64)
    token = item = merge = partial = 0
    for i in range(rows.size):
        row, count, computed = int(rows[i]), int(num_scheduled[i]), int(num_computed[i])
        if count == 1:
            num_parts = computed // PART + 1
            if num_parts > 1:
                merges[merge] = (token, partial, num_parts)
                merge += 1
            for part in range(num_parts):
                end = min(computed + 1, (part + 1) * PART)
                result = partial if num_parts > 1 else -1
                items[item] = (token, count, row, computed, part * PART, end, result)
                costs[item] = end - part * PART + TILE
                partial += num_parts > 1
                item += 1
        else:
            for first in range(0, count, query_tile):
                taken = min(query_tile, count - first)
                end = computed + first + taken
                items[item] = (
                    token + first,
                    taken,
                    row,
                    computed + first,
                    0,
                    end,
                    -1,
                )
                costs[item] = (end + TILE) * (0.5 + 0.25 * taken)
                item += 1
        token += count
    return items, merges, _share(costs, num_kv_heads, num_threads)


@inlined
def _share(costs: npt.NDArray[np.float64], num_kv_heads: int, num_threads: int) -> IndexArray:
    begins = np.zeros(num_threads + 1, np.int64)
    target = costs.sum() * num_kv_heads / num_threads
    cost, thread = 0.0, 1
    for unit in range(costs.size * num_kv_heads):
        # The unit goes to the thread that its middle falls to.
        middle = cost + 0.5 * costs[unit // num_kv_heads]
        while thread < num_threads and middle >= thread * target:
            begins[thread] = unit
            thread += 1
        cost += costs[unit // num_kv_heads]
    begins[thread:] = costs.size * num_kv_heads
    return begins


@kernel
def locate_tokens(
    rows: IndexArray,
    num_scheduled: IndexArray,
    num_computed: IndexArray,
    block_table: IntArray,
    shape: IndexArray,
) -> tuple[IndexArray, IndexArray]:
    """Positions [T] of a step's tokens, and their slots [T]: tile address in layer 0 plus lane."""
    dim, tiles_per_block, block_elements = shape[2], shape[3], shape[4]
    block_size = tiles_per_block * TILE
    num_tokens = num_scheduled.sum()
    positions = np.empty(num_tokens, np.int64)
    slots = np.empty(num_tokens, np.int64)
    token = 0
    for i in range(rows.size):
        for n in range(num_scheduled[i]):
            position = num_computed[i] + n
            block = np.int64(block_table[rows[i], position // block_size])
            offset = position % block_size
            tile = block * block_elements + offset // TILE * (2 * TILE * dim)
            positions[token] = position
            slots[token] = tile + offset % TILE
            token += 1
    return positions, slots

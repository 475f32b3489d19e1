"""The work list's rules, on the planner's twin: coverage, capacity, order, invariance."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_kernels.decode import BATCH_INVARIANT, FAST, ChunkRule, item_capacity
from cupy_kernels.shape import AttentionShape
from cupy_kernels.tests import twins

NUM_SMS = 132
SHAPE = AttentionShape(2, 32, 8, 128, 16)


def plan(lengths: list[int], capacity: int = 0, rule: ChunkRule = FAST) -> twins.IntArray:
    capacity = capacity or item_capacity(len(lengths), SHAPE.num_kv_heads, NUM_SMS)
    rows = np.arange(len(lengths), dtype=np.int32)[::-1]
    items = twins.split_plan(rows, np.array(lengths, np.int32), SHAPE, NUM_SMS, capacity, rule)
    return items[items[:, twins.NUM_TILES] > 0]


def random_lengths(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([10, 300, 5000, 130_000]))
    lengths: list[int] = rng.integers(0, longest, int(rng.integers(1, 300))).tolist()
    return lengths


@pytest.mark.parametrize("seed", range(12))
def test_every_tile_of_every_head_is_covered_once(seed: int) -> None:
    lengths = random_lengths(seed)
    heads = SHAPE.num_kv_heads
    for capacity in (0, len(lengths) * heads + 1):
        items = plan(lengths, capacity)
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for item in items.tolist():
            assert item[twins.SEQ_LEN] == lengths[item[twins.QUERY]]
            assert item[twins.ROW] == len(lengths) - 1 - item[twins.QUERY]
            begin = item[twins.FIRST_TILE]
            span = (begin, begin + item[twins.NUM_TILES])
            spans.setdefault((item[twins.QUERY], item[twins.KV_HEAD]), []).append(span)
        assert len(spans) == heads * sum(length > 0 for length in lengths)
        for (query, _), found in spans.items():
            edges = [0, *(end for _, end in found)]
            assert [begin for begin, _ in found] == edges[:-1]
            assert edges[-1] == -(-lengths[query] // 16)


@pytest.mark.parametrize("seed", range(12))
def test_parts_of_a_head_lie_side_by_side_and_long_items_come_first(seed: int) -> None:
    items = plan(random_lengths(seed))
    where = np.arange(len(items)) - items[:, twins.PART]
    for first, item in zip(where.tolist(), items, strict=True):
        together = items[first : first + item[twins.NUM_PARTS]]
        assert (together[:, [twins.QUERY, twins.KV_HEAD]] == item[[0, 2]]).all()
    # Parts of a row differ by one tile at most.
    assert (np.diff(items[:, twins.NUM_TILES]) <= 1).all()


def test_a_small_batch_gives_every_sm_an_item_and_a_large_one_two() -> None:
    assert len(plan([8192])) == 128
    assert len(plan([32768])) == 264
    assert len(plan([1024] * 16)) == 256
    assert len(plan([1024] * 64)) == 512


def test_short_contexts_are_not_cut_below_the_smallest_chunk() -> None:
    assert plan([64])[:, twins.NUM_PARTS].tolist() == [1] * 8
    assert plan([1024])[0, twins.NUM_TILES] == 4


def test_fixed_chunks_cut_a_row_alike_in_every_batch() -> None:
    alone = plan([5000], capacity=4000, rule=BATCH_INVARIANT)
    together = plan([70_000, 5000, 3, 800], capacity=4000, rule=BATCH_INVARIANT)
    mine = together[together[:, twins.QUERY] == 1]
    columns = [twins.FIRST_TILE, twins.NUM_TILES, twins.PART, twins.NUM_PARTS]
    np.testing.assert_array_equal(mine[:, columns], alone[:, columns])

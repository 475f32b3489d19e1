"""The work list against its numpy twin, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupy_kernels.decode import (
    BATCH_INVARIANT,
    FAST,
    MAX_ROWS,
    ChunkRule,
    SplitPlanner,
    item_capacity,
)
from cupy_kernels.device import Device
from cupy_kernels.shape import AttentionShape
from cupy_kernels.tests import twins
from integration_tests.gpu.cases import make_work, stream

SHAPE = AttentionShape(2, 32, 8, 128, 16)


def device_plan(
    device: Device, lengths: twins.IntArray, rows: twins.IntArray, capacity: int, rule: ChunkRule
) -> twins.IntArray:
    work = make_work(device, SHAPE, len(lengths), capacity)
    planner = SplitPlanner(device, SHAPE, rule)
    tensors = [torch.from_numpy(column).cuda() for column in (rows, lengths)]
    planner.pack(rows=tensors[0], seq_lens=tensors[1], work=work).run(stream())
    torch.cuda.synchronize()
    assert isinstance(work.items, torch.Tensor)
    assert isinstance(work.arrivals, torch.Tensor)
    assert int(work.arrivals.abs().sum()) == 0
    items: twins.IntArray = work.items.cpu().numpy()
    return items


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 33, 100, 256, 1000, MAX_ROWS])
def test_equals_the_twin(device: Device, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    for longest in (1, 40, 3000, 100_000):
        lengths = rng.integers(0, longest + 1, num_rows).astype(np.int32)
        rows = rng.permutation(num_rows + 5)[:num_rows].astype(np.int32)
        roomy = item_capacity(num_rows, SHAPE.num_kv_heads, device.num_sms)
        for rule in (FAST, BATCH_INVARIANT):
            for capacity in (roomy, num_rows * SHAPE.num_kv_heads + 9):
                actual = device_plan(device, lengths, rows, capacity, rule)
                expected = twins.split_plan(rows, lengths, SHAPE, device.num_sms, capacity, rule)
                used = expected[:, twins.NUM_TILES] > 0
                np.testing.assert_array_equal(actual[used], expected[used])
                assert not actual[~used, twins.NUM_TILES].any()


def test_a_list_too_short_for_the_batch_is_our_mistake(device: Device) -> None:
    rows = np.zeros(4, np.int32)
    with pytest.raises(AssertionError, match="too short"):
        device_plan(device, rows, rows, 32, FAST)

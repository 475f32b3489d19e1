from __future__ import annotations

import numpy as np
import pytest

from executor_svc.kv_pool import KvPool, KvPoolError
from executor_svc.plan import Pairs


def pairs(*moves: tuple[int, int]) -> Pairs:
    columns = np.array(moves, np.uint32).reshape(-1, 2)
    return Pairs(src=columns[:, 0], dst=columns[:, 1])


@pytest.fixture
def pool() -> KvPool:
    pool = KvPool(num_device_blocks=6, num_host_blocks=3, block_bytes=4096)
    pool.device[:] = np.arange(6, dtype=np.float32)[:, None]
    pool.host[:] = 100 + np.arange(3, dtype=np.float32)[:, None]
    return pool


def contents(blocks: np.ndarray) -> list[float]:
    assert (blocks == blocks[:, :1]).all(), "a block was copied in part"
    return [float(value) for value in blocks[:, 0]]


def test_sizes(pool: KvPool) -> None:
    assert (pool.num_device_blocks, pool.num_host_blocks) == (6, 3)
    assert pool.device.nbytes == 6 * 4096
    assert KvPool(2, 0, 64).num_host_blocks == 0


def test_the_pool_is_bounded_by_the_memory_given() -> None:
    assert KvPool.num_blocks(10 * 4096 + 4095, 4096) == 10
    with pytest.raises(KvPoolError, match="holds 1 blocks"):
        KvPool.num_blocks(2 * 4096 - 1, 4096)


def test_memory_that_cannot_be_had_is_a_typed_error() -> None:
    with pytest.raises(KvPoolError, match="cannot allocate"):
        KvPool(2, 0, 1 << 60)


def test_a_new_pool_is_zero() -> None:
    pool = KvPool(4, 2, 4096)
    assert not pool.device.any()
    assert not pool.host.any()


def test_copies_move_whole_blocks_and_nothing_else(pool: KvPool) -> None:
    pool.copy(pairs((1, 4), (1, 5), (2, 3)))
    assert contents(pool.device) == [0, 1, 2, 2, 1, 1]
    assert contents(pool.host) == [100, 101, 102]


def test_swaps_round_trip(pool: KvPool) -> None:
    pool.swap_out(pairs((5, 0), (3, 2)))
    assert contents(pool.host) == [5, 101, 3]
    assert contents(pool.device) == [0, 1, 2, 3, 4, 5]
    pool.device[:] = np.nan
    pool.swap_in(pairs((2, 1), (0, 4)))
    assert pool.device[1].tolist() == [3.0] * 1024
    assert pool.device[4].tolist() == [5.0] * 1024
    assert np.isnan(pool.device[[0, 2, 3, 5]]).all()


def test_no_pairs_do_nothing(pool: KvPool) -> None:
    pool.copy(pairs())
    assert contents(pool.device) == [0, 1, 2, 3, 4, 5]

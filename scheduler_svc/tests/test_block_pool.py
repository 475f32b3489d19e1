from collections.abc import Callable

import numpy as np
import pytest

from scheduler_svc.block_pool import BlockPool


def test_padding_block_is_never_allocated() -> None:
    pool = BlockPool(8)
    block_ids = pool.allocate(7)
    assert sorted(block_ids.tolist()) == list(range(1, 8))
    assert pool.num_free == 0


def test_last_freed_is_allocated_first() -> None:
    pool = BlockPool(16)
    block_ids = pool.allocate(6)
    pool.release(block_ids[2:4])
    assert set(pool.allocate(2).tolist()) == set(block_ids[2:4].tolist())


def test_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(4)
    block_ids = pool.allocate(2)
    pool.share(block_ids[:1])
    pool.release(block_ids)
    assert pool.num_used == 1
    pool.release(block_ids[:1])
    assert pool.num_used == 0


FREE = np.array([2], np.int32)


@pytest.mark.parametrize(
    "misuse", [lambda p: p.allocate(4), lambda p: p.release(FREE), lambda p: p.share(FREE)]
)
def test_misuse_is_caught(misuse: Callable[[BlockPool], object]) -> None:
    with pytest.raises(AssertionError):
        misuse(BlockPool(4))


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_conserves_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = BlockPool(int(rng.integers(2, 40)))
    held: list[np.ndarray] = []
    for _ in range(300):
        choice = rng.integers(3)
        if choice == 0 and pool.num_free:
            held.append(pool.allocate(int(rng.integers(1, pool.num_free + 1))))
        elif choice == 1 and held:
            pool.release(held.pop(int(rng.integers(len(held)))))
        elif choice == 2 and held:
            shared = held[int(rng.integers(len(held)))]
            pool.share(shared)
            held.append(shared.copy())
        holders = np.concatenate(held) if held else np.empty(0, np.int32)
        pool.check_conservation(holders)
        assert pool.num_free + len(np.unique(holders)) == pool.num_usable


def test_conservation_check_sees_a_leak() -> None:
    pool = BlockPool(8)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_conservation(np.empty(0, np.int32))

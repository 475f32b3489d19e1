from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from scheduler_svc.block_pool import BlockIds, BlockPool


def ids(*block_ids: int) -> BlockIds:
    return np.array(block_ids, np.int32)


def cached(pool: BlockPool, names: str) -> BlockIds:
    """Blocks that are cached, one under each letter; the last is let go first."""
    block_ids = pool.allocate(len(names))
    pool.name(block_ids, [name.encode() for name in names])
    pool.release(block_ids)
    return block_ids


# ---- misuse


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.allocate(4),
        lambda pool: pool.allocate(-1),
        lambda pool: pool.release(ids(2)),
    ],
)
def test_misuse_is_caught(misuse: Callable[[BlockPool], object]) -> None:
    with pytest.raises(AssertionError):
        misuse(BlockPool(4, num_reserved=1))


def test_a_blank_block_cannot_be_shared() -> None:
    with pytest.raises(KeyError):
        BlockPool(4).share(ids(2))


def test_names_and_blocks_must_be_parallel() -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="zip"):
        pool.name(pool.allocate(2), [b"a"])


def test_reserved_blocks_are_never_allocated() -> None:
    pool = BlockPool(8, num_reserved=1)
    assert sorted(pool.allocate(7).tolist()) == list(range(1, 8))
    assert pool.num_free == 0
    with pytest.raises(AssertionError):
        BlockPool(2, num_reserved=3)


@pytest.mark.parametrize(
    "holders", [ids(), ids(1), ids(1, 1), ids(1, 2, 2)], ids=["none", "one", "twice", "too many"]
)
def test_the_conservation_check_sees_wrong_holders(holders: BlockIds) -> None:
    pool = BlockPool(8, num_reserved=1)
    pool.allocate(2)
    pool.check_conservation(ids(1, 2))
    with pytest.raises(AssertionError):
        pool.check_conservation(holders)


# ---- holders


def test_last_freed_is_allocated_first() -> None:
    pool = BlockPool(16)
    block_ids = pool.allocate(6)
    pool.release(block_ids[2:4])
    assert set(pool.allocate(2).tolist()) == set(block_ids[2:4].tolist())


def test_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(4)
    block_ids = pool.allocate(2)
    assert pool.share(block_ids[:1]) == 0
    assert pool.num_references == 3
    pool.release(block_ids)
    assert pool.num_used == 1
    pool.release(block_ids[:1])
    assert (pool.num_used, pool.num_references) == (0, 0)


# ---- names


def test_a_named_block_is_found_while_held_and_after() -> None:
    pool = BlockPool(4)
    block_ids = pool.allocate(2)
    pool.name(block_ids[:1], [b"a"])
    assert (pool.find(b"a"), pool.find(b"b")) == (block_ids[0], None)
    pool.release(block_ids)
    assert pool.find(b"a") == block_ids[0]
    assert (pool.num_cached, pool.num_free) == (1, 4)


def test_a_block_is_not_found_once_it_was_handed_out_again() -> None:
    pool = BlockPool(2)
    cached(pool, "a")
    pool.allocate(2)
    assert pool.find(b"a") is None
    assert (pool.num_cached, pool.num_evicted) == (0, 1)


def test_a_second_block_with_the_same_content_stays_nameless() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first, [b"a"])
    pool.name(second, [b"a"])
    pool.name(first, [b"b"])  # nor does a block get a second name
    assert (pool.find(b"a"), pool.find(b"b")) == (first[0], None)
    pool.release(second)
    assert pool.num_cached == 0


def test_taking_up_a_cached_block_takes_it_from_the_free_ones() -> None:
    pool = BlockPool(4)
    held = pool.allocate(1)
    block_ids = cached(pool, "ab")
    assert pool.share(np.concatenate([held, block_ids])) == 2
    assert (pool.num_cached, pool.num_free) == (0, 1)
    assert pool.find(b"a") == block_ids[0]


def test_blank_blocks_go_first_then_those_let_go_longest_ago() -> None:
    evicted: list[bytes] = []
    pool = BlockPool(8, on_evict=lambda _, names: evicted.extend(names))
    old, young = cached(pool, "ab"), cached(pool, "cd")
    blank = pool.allocate(4)
    assert not evicted
    assert not set(blank.tolist()) & {*old.tolist(), *young.tolist()}
    pool.allocate(3)
    assert evicted == [b"b", b"a", b"d"]  # of one sequence the end first
    assert (pool.find(b"c"), pool.num_cached) == (young[0], 1)


def test_use_makes_a_block_young() -> None:
    pool = BlockPool(2)
    first = cached(pool, "a")
    cached(pool, "b")
    pool.share(first)
    pool.release(first)
    pool.allocate(1)
    assert (pool.find(b"a"), pool.find(b"b")) == (first[0], None)


def test_whoever_is_told_of_an_eviction_is_told_which_block() -> None:
    told: list[tuple[list[int], list[bytes]]] = []
    pool = BlockPool(3, on_evict=lambda block_ids, names: told.append((block_ids, names)))
    first, second = cached(pool, "ab").tolist()
    assert pool.allocate(3).tolist()[1:] == [second, first]
    assert told == [([second, first], [b"b", b"a"])]


def test_a_forgotten_block_is_blank_at_once_or_when_it_is_let_go() -> None:
    pool = BlockPool(4)
    block_ids = cached(pool, "ab")
    pool.share(block_ids[:1])
    pool.forget(block_ids)
    assert (pool.find(b"a"), pool.find(b"b")) == (None, None)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 3)
    pool.release(block_ids[:1])
    assert (pool.num_cached, pool.num_free) == (0, 4)
    assert pool.num_evicted == 0


def test_forget_cached_leaves_what_is_held() -> None:
    pool = BlockPool(8)
    cached(pool, "ab")
    held = pool.allocate(2)
    pool.name(held[:1], [b"c"])
    assert pool.forget_cached() == 2
    assert pool.forget_cached() == 0
    assert pool.find(b"c") == held[0]
    pool.check_conservation(held)


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_conserves_blocks_and_finds_what_was_not_evicted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names: dict[bytes, int] = {}

    def on_evict(block_ids: list[int], evicted: list[bytes]) -> None:
        assert [names.pop(name) for name in evicted] == block_ids

    pool = BlockPool(int(rng.integers(2, 40)), num_reserved=1, on_evict=on_evict)
    held: list[BlockIds] = []
    for step in range(300):
        choice = rng.integers(6)
        if choice == 0 and pool.num_free:
            held.append(pool.allocate(int(rng.integers(1, pool.num_free + 1))))
        elif choice == 1 and held:
            pool.release(held.pop(int(rng.integers(len(held)))))
        elif choice == 2 and held:
            shared = held[int(rng.integers(len(held)))]
            pool.share(shared)
            held.append(shared.copy())
        elif choice == 3 and held:
            block_id = int(held[int(rng.integers(len(held)))][0])
            if block_id not in names.values():
                pool.name(ids(block_id), [str(step).encode()])
                names[str(step).encode()] = block_id
        elif choice == 4 and names:
            block_id = names[next(iter(names))]
            pool.share(ids(block_id))
            held.append(ids(block_id))
        elif choice == 5 and names and rng.random() < 0.2:
            pool.forget(ids(names.pop(next(iter(names)))))
        holders = np.concatenate([ids(), *held])
        pool.check_conservation(holders)
        assert pool.num_free + len(np.unique(holders)) == pool.num_usable
        assert all(pool.find(name) == block_id for name, block_id in names.items())
    num_cached = pool.num_cached
    assert pool.forget_cached() == num_cached

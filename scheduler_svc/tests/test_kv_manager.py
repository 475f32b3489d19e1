from __future__ import annotations

import numpy as np
import pytest

from scheduler_svc.kv_manager import CachedBlock, KVManager
from scheduler_svc.limits import Limits
from scheduler_svc.request import Branch
from scheduler_svc.step_plan import Moves
from scheduler_svc.tests.driver import make_request

NAMES = [b"a", b"b", b"c", b"d"]


def make(num_blocks: int = 10, num_host_blocks: int = 0) -> KVManager:
    """A manager of so many usable blocks of four tokens, with six rows; a plan is begun."""
    kv = KVManager(
        Limits(
            num_device_blocks=1 + num_blocks,
            block_size=4,
            max_num_seqs=6,
            max_num_batched_tokens=64,
            max_model_len=33,
            vocab_size=100,
            num_host_blocks=num_host_blocks,
        )
    )
    kv.begin_plan(0)
    return kv


def next_plan(kv: KVManager, now_ns: int = 0) -> Moves:
    """Send this plan and an empty one after it; returns what the latter moves."""
    kv.end_plan()
    kv.begin_plan(now_ns)
    moves = kv.end_plan()
    kv.begin_plan(now_ns)
    return moves


def branch_in(row: int, num_tokens: int = 16) -> Branch:
    """A branch whose tokens are named by NAMES, in this row."""
    (branch,) = make_request(1, range(num_tokens)).branches
    branch.block_hashes = list(NAMES[: num_tokens // 4])
    branch.row = row
    return branch


def computed(kv: KVManager, row: int, num_tokens: int) -> list[int]:
    """A row whose full blocks are named by NAMES; returns its table."""
    kv.promise(row, 0)
    kv.grow(row, num_tokens)
    kv.name_blocks(row, NAMES, num_tokens // 4)
    table: list[int] = kv.table(row).tolist()
    return table


# ---- growth and promises


def test_a_row_must_begin_empty() -> None:
    kv = make()
    computed(kv, 0, 4)
    with pytest.raises(AssertionError):
        kv.promise(0, 1)


def test_grow_adds_only_what_is_missing() -> None:
    kv = make()
    kv.promise(0, 3)
    assert len(kv.grow(0, 5)) == 2
    assert len(kv.grow(0, 8)) == 0
    assert len(kv.grow(0, 9)) == 1
    assert kv.missing(0, 12) == 0
    assert kv.missing(0, 13) == 1


def test_promise_counts_until_kept() -> None:
    kv = make()
    kv.promise(0, 4)
    assert kv.num_unpromised == 6
    kv.grow(0, 8)
    assert kv.pool.num_free == 8
    assert kv.num_unpromised == 6
    kv.grow(0, 20)  # one block beyond the promise
    assert kv.num_unpromised == 5
    kv.release(0)
    assert kv.num_unpromised == 10


def test_growth_by_one_keeps_promises_too() -> None:
    kv = make()
    kv.promise(0, 1)
    kv.promise(1, 0)
    kv.grow_by_one(np.array([0, 1]))
    assert kv.num_unpromised == 8
    kv.grow_by_one(np.array([0]))
    assert kv.num_unpromised == 7
    kv.check_conservation([])


def test_full_rows_are_those_at_a_block_boundary() -> None:
    kv = make()
    rows = np.array([0, 2])
    for row in rows.tolist():
        kv.promise(row, 1)
        kv.grow(row, 4)
    assert kv.full(rows, np.array([3, 4], np.int32)).tolist() == [False, True]
    new = kv.grow_by_one(rows[1:])
    assert kv.table(2)[-1] == new[0]


def test_held_blocks_add_up_over_time() -> None:
    kv = make()
    kv.promise(0, 0)
    kv.grow(0, 8)
    next_plan(kv, now_ns=10)
    kv.grow(0, 12)
    next_plan(kv, now_ns=15)
    assert kv.release(0) == 2 * 10 + 3 * 5
    kv.promise(0, 0)
    next_plan(kv, now_ns=100)
    assert kv.release(0) == 0


# ---- the prefix cache


def test_a_prefix_is_found_up_to_the_first_gap_and_without_the_last_token() -> None:
    kv = make()
    table = computed(kv, 0, 16)
    found = [CachedBlock(block_id, is_on_host=False) for block_id in table]
    assert kv.find(branch_in(1, 16)) == found[:3]
    assert kv.find(branch_in(1, 17)) == found
    kv.pool.forget(np.array(table[1:2]))
    assert kv.find(branch_in(1, 16)) == found[:1]


def test_cached_blocks_count_as_free_until_they_are_taken_up() -> None:
    kv = make()
    computed(kv, 0, 8)
    found = kv.find(branch_in(1, 9))
    assert kv.num_held(found) == 2
    kv.release(0)
    assert kv.num_held(found) == 0
    kv.promise(1, 3)
    kv.adopt(1, branch_in(1, 9), found)
    assert kv.num_unpromised == 7  # two are taken, one of the promise is left
    assert kv.pool.num_free == 8


def test_a_prefix_on_the_host_comes_back_under_its_names() -> None:
    kv = make(num_blocks=4, num_host_blocks=4)
    computed(kv, 0, 16)
    kv.release(0)
    kv.promise(1, 4)
    kv.grow(1, 16)
    assert kv.find(branch_in(2)) == []  # on their way to the host
    out = kv.end_plan().swap_out
    kv.begin_plan(0)
    kv.release(1)
    branch = branch_in(2)
    found = kv.find(branch)
    assert [block.is_on_host for block in found] == [True] * 3
    kv.promise(2, 4)
    kv.adopt(2, branch, found)
    host_ids = {block.block_id for block in found}
    assert host_ids < {dst for _, dst in out}
    assert kv.end_plan().swap_in == [
        (block.block_id, block_id)
        for block, block_id in zip(found, kv.table(2).tolist(), strict=True)
    ]
    assert [kv.pool.find(name) for name in NAMES[:3]] == kv.table(2).tolist()
    assert branch.request.blocks.num_swapped_in == 3
    kv.check_conservation([branch])


def test_what_a_plan_reads_from_the_host_is_held_until_it_is_sent() -> None:
    kv = make(num_blocks=4, num_host_blocks=1)
    computed(kv, 0, 4)
    kv.release(0)
    kv.promise(1, 0)
    kv.grow(1, 16)  # evicts it
    next_plan(kv)
    kv.release(1)
    branch = branch_in(2, 5)
    kv.promise(2, 0)
    kv.adopt(2, branch, kv.find(branch))
    assert kv.host.num_free == 0
    kv.end_plan()
    assert kv.host.num_cached == 1


def test_wrong_kv_is_forgotten_in_both_pools() -> None:
    kv = make(num_host_blocks=4)
    computed(kv, 0, 8)
    branch = branch_in(0, 8)
    kv.swap_out(0, branch, branch.block_hashes)
    kv.release(0)
    kv.end_plan()
    kv.forget_blocks([*branch.block_hashes, b"never seen"])
    kv.unpin(branch)
    assert kv.find(branch_in(1, 9)) == []
    assert (kv.pool.num_cached, kv.host.num_cached) == (0, 0)


# ---- forks


@pytest.mark.parametrize("num_tokens", [3, 8, 10])
def test_a_fork_shares_full_blocks_and_gets_its_own_last_one(num_tokens: int) -> None:
    kv = make()
    source = computed(kv, 0, num_tokens)
    kv.promise(1, 1)
    num_full, has_tail = num_tokens // 4, num_tokens % 4 > 0
    tail = kv.fork(0, branch_in(1), num_tokens, is_now=True)
    expected = source[:num_full] + [tail] * has_tail
    assert kv.table(1).tolist() == expected
    assert (tail not in source) if has_tail else (tail == 0)
    assert kv.num_saved_blocks() == num_full
    assert kv.end_plan().copy == ([(source[num_full], tail)] if has_tail else [])
    kv.check_conservation([])


def test_a_fork_leaves_the_table_it_had() -> None:
    kv = make()
    computed(kv, 0, 8)
    kv.promise(1, 0)
    kv.grow(1, 12)
    kv.fork(0, branch_in(1), 8, is_now=True)
    assert kv.pool.num_used == 2
    kv.check_conservation([])


def test_a_copy_that_is_due_holds_both_ends_until_its_plan_is_sent() -> None:
    kv = make(num_blocks=3)
    source = computed(kv, 0, 3)
    kv.promise(1, 1)
    tail = kv.fork(0, branch_in(1), 3, is_now=False)
    assert kv.end_plan().copy == []
    kv.begin_plan(0)
    kv.release(0)
    assert kv.pool.num_free == 1
    assert kv.num_saved_blocks() == 0
    kv.check_conservation([])
    assert kv.end_plan().copy == [(source[0], tail)]
    assert kv.pool.num_free == 2
    kv.check_conservation([])


def test_a_copy_whose_row_ends_first_is_dropped() -> None:
    kv = make()
    computed(kv, 0, 3)
    for row in (1, 2):
        kv.promise(row, 1)
        kv.fork(0, branch_in(row), 3, is_now=False)
    tail = int(kv.table(2)[0])
    kv.release(1)
    kv.check_conservation([])
    assert [dst for _, dst in next_plan(kv).copy] == [tail]
    kv.release(0)
    kv.release(2)
    assert kv.pool.num_used == 0


# ---- the host pool


def test_only_private_blocks_that_the_host_lacks_move_out() -> None:
    kv = make(num_host_blocks=4)
    table = computed(kv, 0, 12)
    kv.promise(1, 0)
    kv.fork(0, branch_in(1), 4, is_now=True)
    assert kv.private_blocks(0, NAMES[:3]) == [1, 2]
    branch = branch_in(0, 12)
    kv.swap_out(0, branch, NAMES[:2])
    assert [src for src, _ in kv.end_plan().swap_out] == table[1:2]
    assert kv.private_blocks(0, NAMES[:3]) == [2]
    assert kv.host.num_used == len(branch.host_block_ids) == 1
    kv.unpin(branch)
    assert (kv.host.num_used, kv.host.num_cached) == (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_conserves_and_shares_only_what_was_forked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv = make(num_blocks=int(rng.integers(3, 30)))
    tokens: dict[int, int] = {}
    for _ in range(400):
        row, source = (int(i) for i in rng.integers(6, size=2))
        if row not in tokens:
            kv.promise(row, int(rng.integers(1, 5)))
            tokens[row] = 0
        elif rng.random() < 0.2:
            kv.release(row)
            del tokens[row]
        elif rng.random() < 0.2 and source in tokens and source != row and kv.pool.num_free:
            kv.fork(source, branch_in(row), tokens[source], is_now=rng.random() < 0.5)
            tokens[row] = tokens[source]
        elif rng.random() < 0.1:
            next_plan(kv)
        else:
            target = min(32, tokens[row] + int(rng.integers(0, 9)))
            if kv.missing(row, target) <= kv.pool.num_free:
                kv.grow(row, target)
                tokens[row] = target
        kv.check_conservation([])
        tails = [int(kv.table(r)[-1]) for r, n in tokens.items() if n % 4]
        assert len(tails) == len(set(tails))
        entries = [block_id for r in tokens for block_id in kv.table(r).tolist()]
        assert kv.num_saved_blocks() == len(entries) - len(set(entries))
        assert all(kv.num_blocks[r] * 4 >= n for r, n in tokens.items())

import numpy as np
import pytest

from scheduler_svc.kv_manager import KVManager


def test_grow_adds_only_what_is_missing() -> None:
    kv = KVManager(num_blocks=10, block_size=4, max_rows=2, max_tokens=32)
    kv.admit(0, 9)
    assert len(kv.grow(0, 5)) == 2
    assert len(kv.grow(0, 8)) == 0
    assert len(kv.grow(0, 9)) == 1
    assert kv.missing(0, 12) == 0
    assert kv.missing(0, 13) == 1


def test_promise_counts_until_kept() -> None:
    kv = KVManager(num_blocks=11, block_size=4, max_rows=2, max_tokens=32)
    kv.admit(0, 16)
    assert kv.num_unpromised == 6
    kv.grow(0, 8)
    assert kv.pool.num_free == 8
    assert kv.num_unpromised == 6
    kv.grow(0, 20)  # one block beyond the promise
    assert kv.num_unpromised == 5
    kv.release(0)
    assert kv.num_unpromised == 10


def test_full_rows_are_those_at_a_block_boundary() -> None:
    kv = KVManager(num_blocks=11, block_size=4, max_rows=3, max_tokens=32)
    rows = np.array([0, 2])
    for row in rows.tolist():
        kv.admit(row, 4)
        kv.grow(row, 4)
    assert kv.full(rows, np.array([3, 4], np.int32)).tolist() == [False, True]
    new = kv.grow_by_one(rows[1:])
    assert kv.table(2)[-1] == new[0]


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_conserves_and_never_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv = KVManager(num_blocks=int(rng.integers(3, 30)), block_size=4, max_rows=6, max_tokens=40)
    tokens: dict[int, int] = {}
    for _ in range(400):
        row = int(rng.integers(6))
        if row not in tokens:
            kv.admit(row, int(rng.integers(1, 20)))
            tokens[row] = 0
        elif rng.random() < 0.2:
            kv.release(row)
            del tokens[row]
        else:
            target = min(40, tokens[row] + int(rng.integers(0, 9)))
            if kv.missing(row, target) <= kv.pool.num_free:
                kv.grow(row, target)
                tokens[row] = target
        kv.check_conservation()
        held = [block for r in tokens for block in kv.table(r).tolist()]
        assert len(held) == len(set(held))
        assert all(kv.num_blocks[r] >= kv.blocks_for(n) for r, n in tokens.items())

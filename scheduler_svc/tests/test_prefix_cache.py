from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from scheduler_svc.prefix_cache import (
    HASH_BYTES,
    BlockHash,
    extend_hashes,
    private_root_hash,
    root_hash,
)

TOKENS = np.arange(100, 120, dtype=np.int32)


def hashes_of(tokens: np.ndarray, root: BlockHash = b"r" * HASH_BYTES) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, root, tokens, len(tokens), 4)
    return hashes


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (3, 0), (4, 1), (7, 1), (20, 5)])
def test_only_full_blocks_have_a_hash(num_tokens: int, expected: int) -> None:
    hashes = hashes_of(TOKENS[:num_tokens])
    assert [len(each) for each in hashes] == [HASH_BYTES] * expected


def test_a_hash_names_all_tokens_up_to_the_end_of_its_block() -> None:
    whole = hashes_of(TOKENS)
    assert len(set(whole)) == 5
    assert hashes_of(TOKENS[:9]) == whole[:2]
    for position in range(len(TOKENS)):
        other = TOKENS.copy()
        other[position] += 1
        num_same = position // 4
        changed = hashes_of(other)
        assert changed[:num_same] == whole[:num_same]
        assert not set(changed[num_same:]) & set(whole)


def test_the_same_block_elsewhere_has_another_hash() -> None:
    same = np.full(12, 7, np.int32)
    assert len(set(hashes_of(same))) == 3


def test_hashes_grow_as_tokens_come() -> None:
    hashes: list[BlockHash] = []
    for num_tokens in (2, 5, 5, 12, 20):
        extend_hashes(hashes, b"r" * HASH_BYTES, TOKENS, num_tokens, 4)
        assert len(hashes) == num_tokens // 4
    assert hashes == hashes_of(TOKENS)


def test_tokens_beyond_those_asked_for_are_not_read() -> None:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, b"r" * HASH_BYTES, TOKENS, 8, 4)
    assert hashes == hashes_of(TOKENS[:8])


def test_chains_of_different_roots_never_meet() -> None:
    roots = [root_hash(b""), root_hash(b"a"), root_hash(b"b"), private_root_hash(1)]
    roots += [private_root_hash(2), root_hash((1).to_bytes(8, "little"))]
    names = [name for root in roots for name in hashes_of(TOKENS, root)]
    assert len(set(names)) == len(names)
    assert root_hash(b"a") == root_hash(b"a")
    assert private_root_hash(1) == private_root_hash(1)


def test_another_process_gives_other_names() -> None:
    """Who does not know the key of this process cannot guess a name."""
    script = "from scheduler_svc.prefix_cache import root_hash; print(root_hash(b'a').hex())"
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert bytes.fromhex(other.stdout.strip()) != root_hash(b"a")
    assert len(other.stdout.strip()) == 2 * HASH_BYTES

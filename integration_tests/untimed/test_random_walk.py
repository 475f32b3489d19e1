"""Random walks: whatever happens, every request gets exactly the tokens of the reference."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest

from integration_tests.random_walk import WalkCounts, walk

SEEDS: Final = 100
_SEEDS_PER_TEST: Final = 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first_seed", range(0, SEEDS, _SEEDS_PER_TEST))
def test_outputs_equal_the_reference(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + _SEEDS_PER_TEST):
        walk(seed)


@pytest.mark.timeout(120)
def test_the_walk_meets_everything_it_is_for() -> None:
    counts = WalkCounts()
    for seed in range(SEEDS, SEEDS + 30):
        counts.add(walk(seed))
    missing = [name for name, count in dataclasses.asdict(counts).items() if count < 10]
    assert not missing, counts

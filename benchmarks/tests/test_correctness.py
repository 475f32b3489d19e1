from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from benchmarks.correctness import Difference, Outcome, count_ties, modes, targets
from benchmarks.hf_peer import HfPeer
from benchmarks.hf_reference import Reference
from blockyard.common.model_dir import ModelDir, SamplingDefaults
from blockyard.common.sizes import parse_size


class FakePeer:
    """Answers with the given logits; remembers what was asked."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = logits
        self.asked: list[tuple[list[int], list[int]]] = []

    async def next_logits(self, token_ids: list[int], candidates: list[int]) -> list[float]:
        self.asked.append((token_ids, candidates))
        return self.logits


def outcome(differences: Sequence[Difference], num_prompts: int = 64) -> Outcome:
    return Outcome("small pool", num_prompts, 1, 0, 0, list(differences))


DIFFERENCE = Difference("small pool", "p", 2, expected_id=7, got_id=8)
REFERENCE = Reference("p", prompt_ids=[1, 2], output_ids=[5, 6, 7, 9])


@pytest.mark.parametrize(("gap", "is_tie"), [(0.9e-3, True), (1.1e-3, False), (5.0, False)])
async def test_only_close_logits_tie(gap: float, is_tie: bool) -> None:
    peer, found = FakePeer([3.0, 3.0 - gap]), outcome([DIFFERENCE])
    await count_ties(cast("HfPeer", peer), [found], [REFERENCE], noise_level=1e-4)
    assert peer.asked == [([1, 2, 5, 6], [7, 8])]
    assert found.num_ties == is_tie
    assert found.num_wrong == (not is_tie)
    assert all(target.is_met for target in targets([found])) is is_tie


def test_too_many_ties_fail() -> None:
    found = outcome([DIFFERENCE] * 2)
    found.num_ties = 2
    missed = [target.name for target in targets([found]) if not target.is_met]
    assert missed == ["small pool: ties"]


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        ("small pool", "preemptions"),
        ("small pool, swapped", "blocks moved"),
        ("asked twice", "cached tokens"),
    ],
)
def test_a_mode_that_does_not_do_what_it_is_for_fails(mode: str, missing: str) -> None:
    found = Outcome(mode, 64, num_preemptions=0, num_swapped_blocks=0, num_cached_tokens=0)
    missed = [target.name for target in targets([found]) if not target.is_met]
    assert missed == [f"{mode}: {missing}"]


def test_the_small_pool_holds_any_request_but_not_all() -> None:
    config = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    model = ModelDir(
        path=Path("/m"),
        name="m",
        digest="d",
        config=config,
        generation_config={},
        chat_template=None,
        vocab_size=100,
        max_position_embeddings=2048,
        eos_token_ids=(),
        bos_token_id=None,
        sampling_defaults=SamplingDefaults(),
    )
    found = [Reference(str(n), [0] * n, [0] * 64) for n in (1, 100, 1500)]
    by_name = {mode.name: mode.settings for mode in modes(model, found)}
    assert len(by_name) == 7
    block_bytes = 2 * 2 * 3 * 16 * 4 * 16
    kv_memory = by_name["small pool"].kv_memory
    assert kv_memory is not None
    num_blocks = parse_size(kv_memory) / block_bytes
    assert num_blocks == int(num_blocks)
    assert -(-1564 // 16) < num_blocks < sum(-(-(n + 64) // 16) for n in (1, 100, 1500))

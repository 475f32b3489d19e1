from __future__ import annotations

import pytest

from scheduler_svc.limits import Limits


def limits(num_usable_blocks: int, max_model_len: int = 1000) -> Limits:
    """Blocks of four tokens."""
    return Limits(
        num_device_blocks=1 + num_usable_blocks,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=max_model_len,
        vocab_size=100,
    )


@pytest.mark.parametrize("max_num_seqs", [0, 17])
def test_every_row_needs_a_token_of_the_budget(max_num_seqs: int) -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        Limits(9, 4, max_num_seqs, 16, 100, 100)


def test_the_last_token_needs_no_slot() -> None:
    assert limits(8).max_total_tokens == 33
    assert limits(8, max_model_len=20).max_total_tokens == 20


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_are_rounded_up(num_tokens: int, expected: int) -> None:
    assert limits(8).blocks_for(num_tokens) == expected


@pytest.mark.parametrize(
    ("num_prompt_tokens", "width", "expected"),
    [
        (8, 1, 33),
        (8, 2, 4 * (2 + 3) + 1),  # two shared, three each of the other six
        (7, 2, 4 * (1 + 3) + 1),  # the seven that are left are no even number
        (8, 4, 4 * (2 + 1) + 1),
        (28, 4, 4 * 7 + 1),  # not one block for each
        (40, 2, 33),  # not even the prompt
    ],
)
def test_beams_share_the_full_blocks_of_the_prompt_only(
    num_prompt_tokens: int, width: int, expected: int
) -> None:
    assert limits(8).max_beam_tokens(num_prompt_tokens, width) == expected
    assert limits(8, max_model_len=12).max_beam_tokens(num_prompt_tokens, width) == 12


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_prompt_tokens", range(1, 33))
def test_the_longest_search_is_the_longest_that_fits(num_prompt_tokens: int, width: int) -> None:
    longest = limits(8).max_beam_tokens(num_prompt_tokens, width)
    if longest > num_prompt_tokens:
        assert limits(8).beam_blocks(num_prompt_tokens, longest, width) <= 8
    assert limits(8).beam_blocks(num_prompt_tokens, longest + 1, width) > 8

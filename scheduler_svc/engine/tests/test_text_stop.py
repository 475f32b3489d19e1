from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from blockyard.common.model_dir import ModelDirError
from scheduler_svc.engine.text_stop import TextStops
from scheduler_svc.frontend.tests.models import (
    END_ID,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_model_dir,
)

TEXT = "The quick brown fox jumps over the lazy dog. Naïve café, 快速的棕色狐狸 and more!"


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without what a post-processor adds."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def first_stop(path: Path, strings: list[str], token_ids: list[int]) -> int | None:
    """How many tokens there are when the check first says so, growing the output one by one."""
    is_stopped = TextStops(path)(strings)
    for count in range(1, len(token_ids) + 1):
        if is_stopped(np.array(token_ids[:count], np.int32)):
            return count
    return None


@pytest.fixture(params=[byte_level_tokenizer, byte_fallback_tokenizer])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


def test_a_directory_without_a_tokenizer_is_named_when_it_is_needed(tmp_path: Path) -> None:
    stops = TextStops(tmp_path)
    with pytest.raises(ModelDirError):
        stops(["x"])


@pytest.mark.parametrize("string", ["fox", "quick brown", "é", "色狐", ". Na", "more!"])
def test_the_token_that_completes_a_string_stops(
    tmp_path: Path, tokenizer: Tokenizer, string: str
) -> None:
    ids = tokens_of(tokenizer, TEXT)
    path = write_model_dir(tmp_path, tokenizer)
    expected = next(
        count for count in range(1, len(ids) + 1) if string in tokenizer.decode(ids[:count])
    )
    assert first_stop(path, [string], ids) == expected
    assert first_stop(path, ["not there", string], ids) == expected


def test_a_string_that_does_not_come_never_stops(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_model_dir(tmp_path, tokenizer)
    assert first_stop(path, ["cat", "foxes", "狐狼"], tokens_of(tokenizer, TEXT)) is None


def test_the_text_of_special_tokens_is_not_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    path = write_model_dir(tmp_path, tokenizer)
    assert first_stop(path, ["<|end|>", "|"], [END_ID] * 20) is None
    ids = [*tokens_of(tokenizer, "fo"), END_ID, *tokens_of(tokenizer, "x")]
    assert first_stop(path, ["fox"], ids) == len(ids)


@pytest.mark.parametrize("string", [" dog", "色狐", "x"])
def test_only_the_end_of_a_long_output_is_looked_at_and_that_is_enough(
    tmp_path: Path, tokenizer: Tokenizer, string: str
) -> None:
    before, after = tokens_of(tokenizer, "a b " * 200), tokens_of(tokenizer, string)
    path = write_model_dir(tmp_path, tokenizer)
    is_stopped = TextStops(path)([string])
    assert not is_stopped(np.array(before, np.int32))
    assert is_stopped(np.array([*before, *after], np.int32))
    # Long after it, the string is out of sight; its hypothesis ended when it came.
    assert not is_stopped(np.array([*after, *before], np.int32))

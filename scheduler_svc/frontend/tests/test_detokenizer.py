from __future__ import annotations

import functools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.tests.models import (
    END_ID,
    TEXTS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
)
from scheduler_svc.frontend.vocabulary import (
    UnsupportedDecoderError,
    Vocabulary,
    load_vocabulary,
)

byte_level = functools.cache(byte_level_tokenizer)
byte_fallback = functools.cache(byte_fallback_tokenizer)
MODEL_VOCAB_SIZE = 512  # more than either tokenizer has: models pad


def byte_ids(data: bytes) -> list[int]:
    """The byte tokens of some bytes."""
    vocab = byte_fallback().get_vocab()
    return [vocab[f"<0x{byte:02X}>"] for byte in data]


@functools.cache
def vocabulary(kind: str) -> Vocabulary:
    tokenizer = byte_level() if kind == "level" else byte_fallback()
    return load_vocabulary(tokenizer, MODEL_VOCAB_SIZE)


def increments(kind: str, token_ids: list[int], cuts: list[int] | None = None) -> list[str]:
    """The text, fed in slices of the given lengths (one token each, when they run out)."""
    detokenizer = new_detokenizer(vocabulary(kind))
    parts: list[str] = []
    lengths = iter(cuts or [])
    begin = 0
    while begin < len(token_ids):
        end = begin + next(lengths, 1)
        parts.append(detokenizer.feed(token_ids[begin:end]))
        begin = end
    return [*parts, detokenizer.flush()]


cut_lists = st.lists(st.integers(1, 5), max_size=20)
ids = st.lists(st.integers(0, MODEL_VOCAB_SIZE - 1), max_size=40)


@settings(max_examples=400, deadline=None)
@given(ids, cut_lists)
def test_byte_level_equals_library_for_random_ids(token_ids: list[int], cuts: list[int]) -> None:
    text = "".join(increments("level", token_ids, cuts))
    assert text == byte_level().decode(token_ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.sampled_from(TEXTS), cut_lists)
def test_byte_level_never_emits_half_a_character(text: str, cuts: list[int]) -> None:
    token_ids = byte_level().encode(text).ids
    parts = increments("level", token_ids, cuts)
    assert "".join(parts) == byte_level().decode(token_ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="the quickfox▁ é猫🙂\u0301", max_size=30), cut_lists)
def test_byte_fallback_equals_library_for_text(text: str, cuts: list[int]) -> None:
    token_ids = byte_fallback().encode(text.replace(" ", "▁")).ids
    parts = increments("fallback", token_ids, cuts)
    assert "".join(parts) == byte_fallback().decode(token_ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


# Runs of bytes that are valid, or invalid from their first character on.
byte_runs = st.sampled_from(
    ["猫", "🙂é", "\x00", b"\xff\xe7\x8c", b"\xe7\x8c", b"\x8c", b"\xf0\x9f"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(byte_runs, st.integers(4, 11)), max_size=8), cut_lists)
def test_byte_fallback_equals_library_for_byte_runs(
    runs: list[tuple[str | bytes, int]], cuts: list[int]
) -> None:
    token_ids: list[int] = []
    for run, piece in runs:
        data = run.encode() if isinstance(run, str) else run
        token_ids += byte_ids(data)
        token_ids.append(piece)
    text = "".join(increments("fallback", token_ids, cuts))
    assert text == byte_fallback().decode(token_ids, skip_special_tokens=True)


def test_byte_run_that_turns_invalid_keeps_what_was_delivered() -> None:
    assert increments("fallback", byte_ids(b"\xc3\xa9\xff\xc3")) == [
        "",
        "é",
        "\ufffd",
        "\ufffd",
        "",
    ]


def test_character_comes_with_its_last_token() -> None:
    token_ids = byte_level().encode("🙂").ids
    assert len(token_ids) == 4
    assert increments("level", token_ids) == ["", "", "", "🙂", ""]
    assert increments("level", token_ids[:3]) == ["", "", "", "\ufffd"]


def test_special_tokens_and_unused_ids_have_no_text() -> None:
    vocab = byte_level().get_vocab()
    think, spaced = vocab["<think>"], vocab["<a b>"]
    assert increments("level", [spaced]) == ["<a b>", ""]
    assert increments("level", [END_ID, think, MODEL_VOCAB_SIZE - 1]) == ["", "<think>", "", ""]


def test_leading_space_is_stripped_once() -> None:
    vocab = byte_fallback().get_vocab()
    space, the = vocab["▁"], vocab["▁the"]
    assert increments("fallback", [space, the, the]) == ["", " the", " the", ""]


def test_cost_per_token_does_not_grow() -> None:
    # A run that never becomes valid is the worst case of window-based detokenisers.
    invalid = byte_ids(b"\xff")
    begin = time.perf_counter()
    text = "".join(increments("fallback", invalid * 100_000))
    assert len(text) == 100_000
    assert time.perf_counter() - begin < 10


def test_other_decoders_are_refused() -> None:
    tokenizer = Tokenizer(models.BPE())
    with pytest.raises(UnsupportedDecoderError, match="None"):
        load_vocabulary(tokenizer, 1)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedDecoderError, match="WordPiece"):
        load_vocabulary(tokenizer, 1)
    tokenizer.decoder = decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])
    with pytest.raises(UnsupportedDecoderError, match="Strip"):
        load_vocabulary(tokenizer, 1)

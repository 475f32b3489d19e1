"""From token ids to text pieces, taken once from the tokenizer's decoder.

A piece is what one token adds to the text, whatever its neighbours: that is true of the two
decoder families that generating models use, and makes incremental detokenisation a table look-up
instead of decoding a window of tokens again and again.

- byte level (GPT-2, Llama 3, Qwen, SmolLM): pieces are bytes, a character may span tokens;
- byte fallback (Llama 2, Mistral, Gemma): pieces are text, rare characters come as byte tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer


class UnsupportedDecoderError(Exception):
    """The tokenizer's decoder belongs to neither family; the message says what it holds."""


@dataclass(frozen=True, slots=True)
class ByteLevelVocabulary:
    """Pieces are bytes; special tokens and unused ids have none."""

    pieces: list[bytes]  # [vocab_size]


@dataclass(frozen=True, slots=True)
class ByteFallbackVocabulary:
    """Pieces are text, or the value of a byte token; special tokens and unused ids are empty."""

    pieces: list[str | int]  # [vocab_size]
    stripped_prefix: str
    """Removed from the very beginning of a text as often as `max_stripped` allows."""
    max_stripped: int


Vocabulary = ByteLevelVocabulary | ByteFallbackVocabulary


def _byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet: a printable character for each byte, as its tokens are written."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER: Final = _byte_level_alphabet()


def load_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Build the pieces of all ids below `vocab_size` (the model's; the tokenizer's may differ).

    Raises UnsupportedDecoderError.
    """
    tokens = _visible_tokens(tokenizer, vocab_size)
    decoder = json.loads(tokenizer.to_str())["decoder"]
    steps = _decoder_steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelVocabulary([_byte_level_piece(token) for token in tokens])
    if steps and all(step["type"] in _FALLBACK_STEPS for step in steps):
        return _byte_fallback_vocabulary(tokens, steps)
    raise UnsupportedDecoderError(
        f"tokenizer.json has a decoder of type {decoder and decoder.get('type')!r} with steps "
        f"{[step.get('type') for step in steps]}; supported are ByteLevel, and sequences of "
        f"{', '.join(_FALLBACK_STEPS)}"
    )


def _visible_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Token strings by id; empty for special tokens and for ids without a token."""
    specials = {
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    tokens = [""] * max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id not in specials and token_id < len(tokens):
            tokens[token_id] = token
    return tokens


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [dict(decoder)]
    return [step for part in decoder["decoders"] for step in _decoder_steps(part)]


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        # An added token written in plain text.
        return token.encode()


_FALLBACK_STEPS: Final = ("Replace", "ByteFallback", "Fuse", "Strip")


def _byte_fallback_vocabulary(
    tokens: list[str], steps: list[dict[str, Any]]
) -> ByteFallbackVocabulary:
    """Apply the steps up to Fuse to each token; what follows concerns the whole text."""
    stripped_prefix, max_stripped = "", 0
    pieces: list[str | int] = list(tokens)
    is_fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Strip" and is_fused and not step["stop"]:
            stripped_prefix, max_stripped = step["content"], step["start"]
        elif kind == "Replace" and not is_fused and "String" in step["pattern"]:
            old, new = step["pattern"]["String"], step["content"]
            pieces = [p.replace(old, new) if isinstance(p, str) else p for p in pieces]
        elif kind == "ByteFallback" and not is_fused:
            pieces = [_byte_or_text(piece) for piece in pieces]
        elif kind == "Fuse":
            is_fused = True
        else:
            raise UnsupportedDecoderError(f"tokenizer.json has an unsupported decoder step: {step}")
    return ByteFallbackVocabulary(pieces, stripped_prefix, max_stripped)


def _byte_or_text(piece: str | int) -> str | int:
    """`<0x41>` is the byte 0x41; anything else is text."""
    if isinstance(piece, str) and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return piece
    return piece

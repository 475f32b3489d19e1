"""Incremental detokenisation: token ids in, whole characters out.

Increments, flush included, add up to what `tokenizer.decode(all_ids, skip_special_tokens=True)`
gives for the output, at a constant cost per token. One difference: when a run of byte-fallback
tokens begins with valid characters and then turns invalid, the library replaces the whole run by
U+FFFD; here the valid characters were already delivered and stay.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final, Protocol

from scheduler_svc.frontend.vocabulary import (
    ByteFallbackVocabulary,
    ByteLevelVocabulary,
    Vocabulary,
)

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_make_utf8_decoder: Final = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one output, as far as it is known."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take the next ids; return the characters that they complete."""

    def flush(self) -> str:
        """End of output: return what is left, U+FFFD for half a character."""


def new_detokenizer(vocabulary: Vocabulary) -> Detokenizer:
    """Start the text of one output."""
    if isinstance(vocabulary, ByteLevelVocabulary):
        return _ByteLevelDetokenizer(vocabulary)
    return _ByteFallbackDetokenizer(vocabulary)


class _ByteLevelDetokenizer:
    def __init__(self, vocabulary: ByteLevelVocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._decoder = _make_utf8_decoder("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._decoder.decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackDetokenizer:
    def __init__(self, vocabulary: ByteFallbackVocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._prefix = vocabulary.stripped_prefix
        self._strips_left = vocabulary.max_stripped
        self._decoder = _make_utf8_decoder("strict")
        self._num_held_bytes = 0
        self._is_run_invalid = False

    def feed(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if isinstance(piece, int):
                parts.append(self._feed_byte(piece))
            elif piece:
                parts.append(self._end_run())
                parts.append(piece)
        return self._strip("".join(parts))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _feed_byte(self, byte: int) -> str:
        """A byte of a run: the character it completes, or U+FFFD for each byte once invalid."""
        if self._is_run_invalid:
            return _REPLACEMENT
        self._num_held_bytes += 1
        try:
            text = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._is_run_invalid = True
            return self._take_held()
        if text:
            self._num_held_bytes = 0
        return text

    def _end_run(self) -> str:
        self._is_run_invalid = False
        return self._take_held() if self._num_held_bytes else ""

    def _take_held(self) -> str:
        text = _REPLACEMENT * self._num_held_bytes
        self._num_held_bytes = 0
        self._decoder.reset()
        return text

    def _strip(self, text: str) -> str:
        while self._strips_left and text:
            if not text.startswith(self._prefix):
                self._strips_left = 0
                break
            text = text[len(self._prefix) :]
            self._strips_left -= 1
        return text

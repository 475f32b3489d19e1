"""Stop strings of beam searches, which the engine must see in the text to end a hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from blockyard.common import model_dir
from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.tokenizer import PromptTokenizer
from scheduler_svc.request import TokenIds

_MAX_BYTES_PER_CHARACTER: Final = 4
_CONTINUATION_BYTES: Final = range(0x80, 0xC0)
"""Of a UTF-8 character, all but the first."""

_MARGIN_TOKENS: Final = 8
"""Special tokens have no text."""


class TextStops:
    """Makes checks for one model's vocabulary, which is loaded when the first one is made."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet of the model directory at `path`."""
        self._path = path
        self._tokenizer: PromptTokenizer | None = None

    def __call__(self, strings: Sequence[str]) -> Callable[[TokenIds], bool]:
        """A check whether output tokens complete one of `strings`. Raises ModelDirError."""
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer(model_dir.load(self._path))
        vocabulary = self._tokenizer.vocabulary
        # A token is at least one byte of the text.
        longest = max(map(len, strings)) * _MAX_BYTES_PER_CHARACTER + _MARGIN_TOKENS

        def is_stopped(token_ids: TokenIds) -> bool:
            end = token_ids[-longest - _MAX_BYTES_PER_CHARACTER :].tolist()
            begin = max(0, len(end) - longest)
            # A run of byte tokens that begins inside a character has no text.
            while begin and vocabulary.pieces[end[begin]] in _CONTINUATION_BYTES:
                begin -= 1
            text = new_detokenizer(vocabulary).feed(end[begin:])
            return any(string in text for string in strings)

        return is_stopped

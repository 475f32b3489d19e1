"""Stop strings in streamed text, whatever the token boundaries.

The match that is complete first wins (of two that end together, the longer), so the outcome does
not depend on how the text was cut into tokens. Text is held back only while it can still be the
beginning of a stop string. Matching is Knuth-Morris-Pratt: constant cost per character and string.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self


class StopStrings:
    """The stop strings of a request, looked for in one text."""

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings` are not empty."""
        assert all(strings)
        # Longest first: of two that end together, the longer wins.
        self._strings = sorted(strings, key=len, reverse=True)
        self._fallbacks = [_fallback_table(string) for string in self._strings]
        self._first_characters = frozenset(string[0] for string in self._strings)
        self._matched = [0] * len(self._strings)
        self._held = ""

    def fresh(self) -> Self:
        """The same strings for another text; costs nothing but the state of the search."""
        other = copy.copy(self)
        other._matched = [0] * len(self._strings)
        other._held = ""
        return other

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take new text. Returns the text that may be delivered and the stop string found, if any.

        After a match, nothing may be fed or flushed any more: the rest of the text is cut.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text, None
        buffer = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            found = self._advance(character)
            if found is not None:
                return buffer[: index - len(found)], found
        # What is half matched now may be the beginning of a stop string; the rest cannot.
        end = len(buffer) - max(self._matched)
        self._held = buffer[end:]
        return buffer[:end], None

    def flush(self) -> str:
        """End of output: the text that was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Take one character in every automaton; return the first string it completes."""
        found = None
        for i, string in enumerate(self._strings):
            length = self._matched[i]
            while length and string[length] != character:
                length = self._fallbacks[i][length - 1]
            length += string[length] == character
            self._matched[i] = length
            if length == len(string) and found is None:
                found = string
                self._matched[i] = 0
        return found


def _fallback_table(string: str) -> list[int]:
    """[len(string)]: length of the longest proper prefix that is also a suffix of string[:i+1]."""
    table = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[length] != string[i]:
            length = table[length - 1]
        length += string[length] == string[i]
        table[i] = length
    return table

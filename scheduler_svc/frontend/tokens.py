"""The bearer tokens of a file, and whose they are.

One a line: the client's name, white space, its token. A client may have several, so that it can
change from one to the next. Blank lines and those that begin with # count for nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Final

from blockyard.common.reloading import FileError, read_bytes

MIN_TOKEN_CHARACTERS: Final = 16

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""As RFC 6750 has it."""


class Tokens:
    """Whose a token is. Keeps digests of tokens alone, and shows nothing of them."""

    def __init__(self, names: dict[bytes, str]) -> None:
        """`names`: the client's name by the digest of its token."""
        self._names = names

    def client_of(self, token: str) -> str | None:
        """The client's name; None: nobody's. Takes as long whichever token it is."""
        digest = _digest(token)
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def load_tokens(path: Path) -> Tokens:
    """Read a token file. Raises FileError, which names the line and shows nothing of it."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not text in UTF-8") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if (problem := _line_problem(words)) is not None:
            raise FileError(f"{path}, line {number}: {problem}")
        name, token = words
        if names.setdefault(_digest(token), name) != name:
            raise FileError(f"{path}, line {number}: two clients have the same token")
    if not names:
        raise FileError(f"{path}: holds no token")
    return Tokens(names)


def _line_problem(words: list[str]) -> str | None:
    """What is wrong with a line of these words; None: nothing."""
    if len(words) != 2:
        return "must be a client's name and its token"
    name, token = words
    if not _NAME.fullmatch(name):
        return "the name must be at most 64 letters, digits and . _ @ -"
    if not _TOKEN.fullmatch(token):
        return "the token has characters that a bearer token cannot have"
    if len(token) < MIN_TOKEN_CHARACTERS:
        return f"the token must have at least {MIN_TOKEN_CHARACTERS} characters"
    return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

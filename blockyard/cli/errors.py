"""How commands fail."""

from __future__ import annotations


class CommandError(Exception):
    """Shown on stderr without a traceback; `exit_code` goes to the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

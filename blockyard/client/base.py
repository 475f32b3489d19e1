"""What the two clients have in common beside the messages."""

from __future__ import annotations


class ClientBase:
    """The client's own timeout."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout` holds for each call that gives none [s]; None: no limit."""
        self._timeout = timeout

    def _limit(self, timeout: float | None) -> float | None:
        """The timeout of a call that was given this one [s]."""
        return self._timeout if timeout is None else timeout

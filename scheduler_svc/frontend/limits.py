"""What one request may take of a front end, beyond what the model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler_svc.errors import Reason, RequestError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The operator's limits; None: no limit."""

    max_request_bytes: int
    max_prompt_tokens: int | None
    max_buffered_tokens: int  # of one choice that may wait for its reader

    def check_bytes(self, num_bytes: int) -> None:
        """Refuse a message that is too long. Raises RequestError."""
        if num_bytes > self.max_request_bytes:
            raise _too_large("bytes", num_bytes, self.max_request_bytes)

    def check_text(self, num_chars: int, max_text_chars: Callable[[int], int]) -> None:
        """Refuse a text that surely has too many tokens, before it is tokenised.

        `max_text_chars` says which length no text of so many tokens has. Raises RequestError.
        """
        limit = self.max_prompt_tokens
        if limit is not None and num_chars > max_text_chars(limit):
            raise _too_large("prompt tokens", None, limit)

    def check_prompt(self, num_tokens: int) -> None:
        """Refuse a prompt that is too long. Raises RequestError."""
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            raise _too_large("prompt tokens", num_tokens, self.max_prompt_tokens)


def _too_large(what: str, number: int | None, limit: int) -> RequestError:
    has = f"{number} {what}" if number is not None else f"far more {what}"
    message = f"the request has {has}; this server takes {limit}"
    return RequestError(Reason.REQUEST_TOO_LARGE, message, subject=what)

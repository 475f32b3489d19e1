"""When the tokens of a request came. Times are of time.monotonic [s], one clock for all processes.

Nothing here knows gRPC or processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class ChoiceTimes:
    """One sample of a request."""

    num_tokens: int = 0
    num_first_tokens: int = 0
    """Of the first message."""
    first_s: float = 0.0
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between its messages."""

    def add(self, num_tokens: int, now_s: float) -> None:
        """Take a message with new tokens."""
        if self.num_tokens:
            self.gaps_s.append(now_s - self.last_s)
        else:
            self.first_s = now_s
            self.num_first_tokens = num_tokens
        self.num_tokens += num_tokens
        self.last_s = now_s

    @property
    def token_time_s(self) -> float | None:
        """Mean time of the tokens after the first message; None if there are none."""
        num_later = self.num_tokens - self.num_first_tokens
        return (self.last_s - self.first_s) / num_later if num_later else None


@dataclass(slots=True)
class RequestTimes:
    """One request. `due_s` is when it was to be sent, which latencies are counted from."""

    index: int
    num_prompt_tokens: int
    due_s: float
    sent_s: float = 0.0
    choices: list[ChoiceTimes] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None
    """What went wrong, as one line that begins with a code."""

    @property
    def num_output_tokens(self) -> int:
        """Of all its samples."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def first_token_s(self) -> float:
        """From when it was due to its first token."""
        return min(choice.first_s for choice in self.choices) - self.due_s

    @property
    def end_s(self) -> float:
        """When its last token came."""
        return max(choice.last_s for choice in self.choices)

    @property
    def total_s(self) -> float:
        """From when it was due to its last token."""
        return self.end_s - self.due_s

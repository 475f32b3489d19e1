"""How much may wait, and what is said to those that may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler

MIN_RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 60.0
_UNKNOWN_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class QueueBound:
    """Most that wait: branches, and prompt tokens of requests that have not run yet."""

    max_waiting: int
    max_waiting_tokens: int

    def make_room(
        self, scheduler: Scheduler, num_prompt_tokens: int, drop: Callable[[Request], None]
    ) -> None:
        """Let one more request with such a prompt wait, if need be instead of late ones.

        `drop` must take a late request out of the queue. Raises RequestError if there is no room.
        """
        while (full := self._exceeded_by(scheduler, num_prompt_tokens)) is not None:
            late = scheduler.waiting.peek_late()
            if late is None:
                raise full
            drop(late.request)

    def _exceeded_by(self, scheduler: Scheduler, num_prompt_tokens: int) -> RequestError | None:
        """The error for one more request with such a prompt; None if there is room for it.

        An empty queue takes a prompt of any length.
        """
        waiting = scheduler.waiting
        if len(waiting) >= self.max_waiting:
            subject, limit = "waiting requests", self.max_waiting
        elif len(waiting) and waiting.num_prompt_tokens + num_prompt_tokens > (
            self.max_waiting_tokens
        ):
            subject, limit = "waiting prompt tokens", self.max_waiting_tokens
        else:
            return None
        wait_s = scheduler.estimated_wait_ns() / 1e9 or _UNKNOWN_RETRY_S
        return RequestError(
            Reason.QUEUE_FULL,
            f"the queue is full ({limit} {subject}); retry later",
            subject=subject,
            retry_delay_s=min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S),
        )


def deadline_error() -> RequestError:
    """For a request that waited too long to be done in time."""
    return RequestError(
        Reason.DEADLINE_UNREACHABLE,
        "the request waited, and can no longer be done by its deadline; nothing was computed",
    )

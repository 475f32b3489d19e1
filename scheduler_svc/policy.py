"""Order of service: pure functions, and the queue that follows them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from scheduler_svc.request import Request, RequestStatus

MAX_PREEMPTIONS_UNRESERVED = 2
"""After this many preemptions a request re-enters only with its worst case reserved."""


def needs_reservation(request: Request) -> bool:
    """Whether admission must promise the request room for its longest output."""
    return request.num_preemptions >= MAX_PREEMPTIONS_UNRESERVED


def pick_victim(running: Iterable[Request], for_request: Request) -> Request | None:
    """Who gives up blocks so that `for_request` can grow; None if nobody may.

    Only requests that arrived later are asked, so the oldest running request is never a victim:
    that is the proof of progress. The youngest goes first, except that requests admitted with a
    reservation go last, which bounds how often one request is preempted.
    """
    younger = [request for request in running if request.key > for_request.key]
    return max(younger, key=lambda r: (not needs_reservation(r), r.key), default=None)


_MAX_DEAD_ENTRIES = 64
"""Entries of ended requests that the queue may hold, beside as many as it has live ones."""


class WaitingQueue:
    """Waiting requests in order of arrival. A preempted request returns to its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Request]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        return (r for _, r in self._heap if r.status is RequestStatus.WAITING)

    def push(self, request: Request) -> None:
        """Add a request whose status is WAITING."""
        heapq.heappush(self._heap, (request.key, request))
        self._num_waiting += 1

    def peek(self) -> Request | None:
        """The next in line, or None."""
        while self._heap and self._heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)  # it ended while it waited
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Remove and return the next in line; there must be one."""
        request = self.peek()
        assert request is not None
        heapq.heappop(self._heap)
        self._num_waiting -= 1
        return request

    def discard(self, request: Request) -> None:
        """Count out a request that ended while it waited; its entry is dropped when met."""
        assert request.status.is_finished
        self._num_waiting -= 1
        if len(self._heap) > 2 * self._num_waiting + _MAX_DEAD_ENTRIES:
            self._heap = [(r.key, r) for r in self]
            heapq.heapify(self._heap)

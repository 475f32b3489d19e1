"""Who waits, in order of service: class, slack to the deadline, arrival.

A request gets a place in line when it first enters a row. From then on only that place counts:
whoever is preempted, or loses the executor, comes back before all that have not run yet, in the
order in which they entered. Without deadlines and classes that is the order of arrival. Suspects
that must run alone come first, the most suspected one before all: if it does no harm, that shows
before anything else can end the executor.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from scheduler_svc.request import Branch, Request, RequestStatus

MAX_OVERTAKEN_NS: Final = 60_000_000_000
"""A request without a deadline waits as one that must start so long after its arrival, so that
those with a deadline cannot keep it out for ever."""

_MAX_DEAD_ENTRIES: Final = 64
"""Entries of ended branches that the queue may hold, beside as many as it has live ones."""

_Order = tuple[int, int, int, int]
_Heap = list[tuple[_Order, Branch]]


class WaitingQueue:
    """Waiting branches. The late ones, who can hardly meet their deadline, yield to all others."""

    def __init__(self) -> None:
        self._timely: _Heap = []
        self._late: _Heap = []
        self._num_waiting = 0
        # Prompts of the requests that have not entered yet [tokens].
        self.num_prompt_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Branch]:
        heaps = (*self._timely, *self._late)
        return (b for _, b in heaps if b.status is RequestStatus.WAITING)

    def push(self, branch: Branch) -> None:
        """Add a branch whose status is WAITING."""
        branch.is_queued = True
        self._count(branch, 1)
        heap = self._late if _is_late(branch.request) else self._timely
        heapq.heappush(heap, (_order(branch), branch))

    def peek(self) -> Branch | None:
        """The next in line, or None."""
        return _head(self._timely) or _head(self._late)

    def peek_late(self) -> Branch | None:
        """Of those who can hardly meet their deadline, the one whose deadline is next."""
        return _head(self._late)

    def pop(self) -> Branch:
        """Remove and return the next in line; there must be one."""
        branch = self.peek()
        assert branch is not None
        heapq.heappop(self._timely or self._late)
        branch.is_queued = False
        self._count(branch, -1)
        return branch

    def demote(self) -> None:
        """The next in line, which must be on time, can hardly meet its deadline any more."""
        branch = self.pop()
        assert not _is_late(branch.request)
        branch.request.is_late = True
        self.push(branch)

    def discard(self, branch: Branch) -> None:
        """Count out a branch that ended while it waited; its entry is dropped when met."""
        assert branch.status.is_finished
        branch.is_queued = False
        self._count(branch, -1)
        if len(self._timely) + len(self._late) > 2 * self._num_waiting + _MAX_DEAD_ENTRIES:
            for heap in (self._timely, self._late):
                heap[:] = [e for e in heap if e[1].status is RequestStatus.WAITING]
                heapq.heapify(heap)

    def _count(self, branch: Branch, sign: int) -> None:
        self._num_waiting += sign
        if not branch.request.place:
            self.num_prompt_tokens += sign * branch.request.num_prompt_tokens


def _is_late(request: Request) -> bool:
    return request.is_late and not request.place


def _order(branch: Branch) -> _Order:
    request = branch.request
    if request.place:
        num_suspicions = branch.num_suspicions if branch.must_run_alone else 0
        return (0, -num_suspicions, request.place, branch.key)
    if request.is_late:
        return (1, -request.priority, request.deadline_ns, branch.key)
    return (1, -request.priority, request.latest_start_ns, branch.key)


def _head(heap: _Heap) -> Branch | None:
    while heap and heap[0][1].status is not RequestStatus.WAITING:
        heapq.heappop(heap)  # it ended while it waited
    return heap[0][1] if heap else None

"""Order of service and prices: pure functions, and the queue that follows them."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.request import Branch, Request, RequestStatus

MAX_PREEMPTIONS_UNRESERVED = 2
"""After this many preemptions a branch re-enters only with its worst case reserved."""


class PreemptionMode(enum.Enum):
    """What becomes of a victim's KV."""

    AUTO = "auto"  # the cheaper of the two
    RECOMPUTE = "recompute"
    SWAP = "swap"  # as far as the host pool has room


@dataclass(frozen=True, slots=True)
class Policy:
    """How the scheduler serves. The last two fields are other systems' ways, for comparison."""

    preemption: PreemptionMode = PreemptionMode.AUTO
    is_caching: bool = True  # False: no prefix cache
    # Tokens whose blocks a branch gets at admission and keeps to its end; None: as it grows.
    reserve_tokens: Callable[[Request], int] | None = None
    is_static: bool = False  # admit only when nothing runs


def needs_reservation(branch: Branch) -> bool:
    """Whether admission must promise the branch room for its longest output."""
    return branch.num_preemptions >= MAX_PREEMPTIONS_UNRESERVED


def pick_victim(running: Iterable[Branch], for_branch: Branch) -> Branch | None:
    """Who gives up blocks so that `for_branch` can grow; None if nobody may.

    Only branches that arrived later are asked, so the oldest one running is never a victim: that
    is the proof of progress. The youngest goes first, except that branches admitted with a
    reservation go last, so that few are preempted a third time. Lanes of one beam search do not
    take from each other.
    """
    younger = [b for b in running if b.key > for_branch.key and not _is_same_beam(b, for_branch)]
    return max(younger, key=lambda b: (not needs_reservation(b), b.key), default=None)


def _is_same_beam(branch: Branch, other: Branch) -> bool:
    return branch.request is other.request and branch.request.beam is not None


def should_swap(
    mode: PreemptionMode, cost: CostModel, limits: Limits, num_blocks: int, num_tokens_before: int
) -> bool:
    """Whether moving full blocks out and in again beats computing them again.

    Args:
        mode: AUTO decides by price.
        cost: prices; without one of swapping nothing is swapped.
        limits: sizes of a block, and of the chunks in which tokens would be computed.
        num_blocks: to move, at least 1, at the end of a sequence.
        num_tokens_before: of the sequence; computing the others reads their KV.
    """
    if mode is not PreemptionMode.AUTO:
        return mode is PreemptionMode.SWAP
    if not cost.swap_bytes_per_s:
        return False
    swap_ns = 2 * num_blocks * limits.block_bytes / cost.swap_bytes_per_s * 1e9
    return swap_ns < _recompute_ns(cost, limits, num_blocks, num_tokens_before)


def _recompute_ns(
    cost: CostModel, limits: Limits, num_blocks: int, num_tokens_before: int
) -> float:
    """Time of computing the blocks' tokens in chunks beside other rows, without fixed costs."""
    num_tokens = num_blocks * limits.block_size
    total_ns = num_tokens * cost.token_ns
    if cost.kv_bytes_per_s:
        num_chunks = -(-num_tokens // limits.max_num_batched_tokens)
        mean_context = num_tokens_before + num_tokens * (num_chunks + 1) / (2 * num_chunks)
        read_bytes = num_chunks * mean_context * limits.block_bytes / limits.block_size
        total_ns += read_bytes / cost.kv_bytes_per_s * 1e9
    return total_ns


_MAX_DEAD_ENTRIES = 64
"""Entries of ended branches that the queue may hold, beside as many as it has live ones."""


class WaitingQueue:
    """Waiting branches in order of arrival. A preempted one returns to its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Branch]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Branch]:
        return (b for _, b in self._heap if b.status is RequestStatus.WAITING)

    def push(self, branch: Branch) -> None:
        """Add a branch whose status is WAITING."""
        branch.is_queued = True
        heapq.heappush(self._heap, (branch.key, branch))
        self._num_waiting += 1

    def peek(self) -> Branch | None:
        """The next in line, or None."""
        while self._heap and self._heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)  # it ended while it waited
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Branch:
        """Remove and return the next in line; there must be one."""
        branch = self.peek()
        assert branch is not None
        heapq.heappop(self._heap)
        branch.is_queued = False
        self._num_waiting -= 1
        return branch

    def discard(self, branch: Branch) -> None:
        """Count out a branch that ended while it waited; its entry is dropped when met."""
        assert branch.status.is_finished
        branch.is_queued = False
        self._num_waiting -= 1
        if len(self._heap) > 2 * self._num_waiting + _MAX_DEAD_ENTRIES:
            self._heap = [(b.key, b) for b in self]
            heapq.heapify(self._heap)

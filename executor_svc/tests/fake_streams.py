"""CUDA streams and events without a GPU: work is queued, and done later in any allowed order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Wait:
    event: FakeEvent
    number: int  # of the recording waited for


@dataclass(frozen=True)
class _Record:
    event: FakeEvent
    number: int


class FakeEvent:
    """As torch.cuda.Event: to wait for it is to wait for what was recorded last by then."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_reached = 0

    def record(self, stream: FakeStream) -> None:
        self.num_recorded += 1
        stream.queue.append(_Record(self, self.num_recorded))


class FakeStream:
    """As torch.cuda.Stream, as far as a pool of blocks needs it."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.queue: deque[_Wait | _Record | Callable[[], object]] = deque()

    def wait_event(self, event: FakeEvent) -> None:
        self.queue.append(_Wait(event, event.num_recorded))

    def _is_blocked(self) -> bool:
        if not self.queue:
            return True
        head = self.queue[0]
        return isinstance(head, _Wait) and head.event.num_reached < head.number

    def step(self) -> bool:
        """Do what stands first; False if there is nothing, or it has to wait."""
        if self._is_blocked():
            return False
        head = self.queue.popleft()
        if isinstance(head, _Record):
            head.event.num_reached = max(head.event.num_reached, head.number)
        elif not isinstance(head, _Wait):
            head()
        return True


def run_all(streams: list[FakeStream], rng: random.Random) -> None:
    """Do everything queued, the streams taking turns at random; AssertionError if they cannot."""
    while any(stream.queue for stream in streams):
        order = rng.sample(streams, len(streams))
        assert any(stream.step() for stream in order), "every stream waits for another"

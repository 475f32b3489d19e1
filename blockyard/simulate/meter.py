"""What the live block tables hold, integrated over virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scheduler_svc.scheduler import Scheduler

_MAX_SAMPLES = 2048
"""Of a timeline; when it is full every second one goes."""


@dataclass(slots=True)
class Timeline:
    """The state at moments about evenly spread over the steps. Parallel lists."""

    time_ns: list[int] = field(default_factory=list)
    num_running: list[int] = field(default_factory=list)
    num_waiting: list[int] = field(default_factory=list)
    num_used_slots: list[int] = field(default_factory=list)  # written, or by a plan in flight
    num_unused_slots: list[int] = field(default_factory=list)  # of held blocks
    stride: int = 1  # steps from one sample to the next

    def add(self, time_ns: int, *values: int) -> None:
        """Append one sample, values in the order of the fields."""
        columns = self._columns
        for column, value in zip(columns, (time_ns, *values), strict=True):
            column.append(value)
        if len(self.time_ns) > _MAX_SAMPLES:
            for column in columns:
                del column[1::2]
            self.stride *= 2

    @property
    def _columns(self) -> tuple[list[int], ...]:
        return (
            self.time_ns,
            self.num_running,
            self.num_waiting,
            self.num_used_slots,
            self.num_unused_slots,
        )


class Meter:
    """Reads the scheduler's columns once for every interval in which nothing changed.

    A slot is used if its token's KV is written or a plan in flight writes it; the other slots of
    held blocks are unused: the end of a last block, or room reserved for tokens to come. Shared
    blocks are full, so unused slots belong to one request each.
    """

    def __init__(self, scheduler: Scheduler, num_requests: int) -> None:
        """Measure `scheduler` from time 0; its request ids must be 0 to num_requests - 1."""
        self._scheduler = scheduler
        self._now_ns = 0
        self._num_intervals = 0
        # Per request, shared blocks counted by each holder [slot * ns], [num_requests].
        self.held_by_request: npt.NDArray[np.float64] = np.zeros(num_requests)
        self.unused_by_request: npt.NDArray[np.float64] = np.zeros(num_requests)
        # Of the pool, shared blocks counted once [slot * ns].
        self.held = 0.0
        self.unused = 0.0
        self.in_flight = 0.0  # written by plans under way
        self.num_running_time = 0.0  # [request * ns]
        self.timeline = Timeline()

    def advance(self, now_ns: int, num_tokens_in_flight: int) -> None:
        """Account for the time up to `now_ns`, before anything changes at that moment."""
        elapsed_ns = now_ns - self._now_ns
        if not elapsed_ns:
            return
        kv, rows = self._scheduler.kv, self._scheduler.rows
        live = np.flatnonzero(kv.num_blocks)
        held = kv.num_blocks[live] * kv.block_size
        unused = held - rows.num_planned[live]
        ids = rows.request_ids[live].astype(np.int64)
        self.held_by_request[ids] += held * float(elapsed_ns)
        self.unused_by_request[ids] += unused * float(elapsed_ns)
        num_held, num_unused = kv.pool.num_used * kv.block_size, int(unused.sum())
        self.held += num_held * elapsed_ns
        self.unused += num_unused * elapsed_ns
        self.in_flight += num_tokens_in_flight * elapsed_ns
        self.num_running_time += len(live) * elapsed_ns
        if self._num_intervals % self.timeline.stride == 0:
            num_waiting = len(self._scheduler.waiting)
            self.timeline.add(
                self._now_ns, len(live), num_waiting, num_held - num_unused, num_unused
            )
        self._num_intervals += 1
        self._now_ns = now_ns

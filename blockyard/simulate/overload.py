"""More requests than the device can serve, each with a deadline: what is done in time.

As `run`, with clients that give up: at its deadline a request is cancelled, whether it waits or
runs. The queue is bounded, and who finds it full is gone.
"""

from __future__ import annotations

import contextlib
import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.simulate.device import SimulatedDevice
from blockyard.simulate.prompts import Prompts
from blockyard.simulate.setup import Setup
from blockyard.simulate.trace import NS_PER_S, Trace
from scheduler_svc.engine.queue_bound import QueueBound
from scheduler_svc.errors import RequestError
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler

_CLOCK_START_NS: Final = 1
"""The scheduler's clock at virtual time 0: to it a time of 0 is one that has not come."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests, how long each client waits, and how many may wait."""

    trace: Trace
    patience_ns: npt.NDArray[np.int64]  # [num_requests], from arrival to deadline
    bound: QueueBound
    # Whether the scheduler is told of the deadlines; else it serves in order of arrival.
    tells_deadlines: bool = True


@dataclass(slots=True)
class Result:
    """What became of the requests. `in_time` + refused + dropped + cancelled are all of them."""

    num_in_time: int = 0
    num_tokens_in_time: int = 0  # output
    num_refused: int = 0  # the queue was full
    num_dropped: int = 0  # by the scheduler, before their prefill
    num_cancelled_waiting: int = 0
    num_cancelled_running: int = 0  # computed in vain
    end_ns: int = 0

    @property
    def goodput(self) -> float:
        """Requests done in time, per second of the whole run."""
        return self.num_in_time / (self.end_ns / NS_PER_S)

    @property
    def token_goodput(self) -> float:
        """Output tokens of requests done in time, per second of the whole run."""
        return self.num_tokens_in_time / (self.end_ns / NS_PER_S)


def serve(demand: Demand, setup: Setup) -> Result:
    """Serve until every request has ended in some way; all must fit the setup's limits."""
    simulation = _Overload(demand, setup)
    simulation.run()
    return simulation.result


class _Overload:
    """The event loop: arrivals, results, deadlines."""

    def __init__(self, demand: Demand, setup: Setup) -> None:
        self.result = Result()
        self._demand = demand
        self._setup = setup
        self._scheduler = Scheduler(setup.limits, setup.policy)
        self._scheduler.begin_epoch(1, setup.limits)
        self._scheduler.set_cost_model(setup.profile.cost)
        self._device = SimulatedDevice(setup.profile, setup.limits.block_bytes)
        self._prompts = Prompts(demand.trace, setup.limits.vocab_size)
        self._now_ns = 0
        self._num_arrived = 0
        self._live: dict[int, Request] = {}
        self._deadlines: list[tuple[int, int]] = []  # of live requests and some that have ended

    def run(self) -> None:
        while (next_ns := self._next_event_ns()) is not None:
            self._now_ns = next_ns
            while self._device.next_end_ns == next_ns:
                self._commit()
            self._cancel_overdue()
            self._take_arrivals()
            self._plan()
        assert not self._live
        self.result.end_ns = self._now_ns

    def _next_event_ns(self) -> int | None:
        times = [self._device.next_end_ns]
        while self._deadlines and self._deadlines[0][1] not in self._live:
            heapq.heappop(self._deadlines)
        if self._deadlines:
            times.append(self._deadlines[0][0])
        if self._num_arrived < len(self._demand.trace):
            times.append(int(self._demand.trace.arrival_ns[self._num_arrived]))
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    def _take_arrivals(self) -> None:
        arrival_ns = self._demand.trace.arrival_ns
        while self._num_arrived < len(arrival_ns) and arrival_ns[self._num_arrived] <= self._now_ns:
            request = self._request(self._num_arrived)
            self._num_arrived += 1
            try:
                self._demand.bound.make_room(
                    self._scheduler, request.num_prompt_tokens, self._drop_late
                )
            except RequestError:
                self.result.num_refused += 1
                continue
            self._live[request.key] = request
            deadline_ns = self._now_ns + int(self._demand.patience_ns[request.key])
            heapq.heappush(self._deadlines, (deadline_ns, request.key))
            self._scheduler.submit(request)

    def _request(self, index: int) -> Request:
        demand = self._demand
        prompt = self._prompts.of(index)
        now_ns = _CLOCK_START_NS + self._now_ns
        return Request(
            key=index,
            frontend=0,
            request_id=index,
            prompt=prompt,
            max_total_tokens=len(prompt) + int(demand.trace.num_output_tokens[index]),
            arrival_ns=now_ns,
            deadline_ns=now_ns + int(demand.patience_ns[index]) if demand.tells_deadlines else 0,
        )

    def _drop_late(self, request: Request) -> None:
        self._scheduler.abort(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        self.result.num_dropped += 1
        del self._live[request.key]

    def _cancel_overdue(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_ns:
            _, key = heapq.heappop(self._deadlines)
            if (request := self._live.pop(key, None)) is not None:
                self._scheduler.abort(request)
                self.result.num_cancelled_running += request.place > 0
                self.result.num_cancelled_waiting += request.place == 0

    def _plan(self) -> None:
        scheduler = self._scheduler
        while len(self._device) < self._setup.window:
            plan = scheduler.plan(_CLOCK_START_NS + self._now_ns)
            for request in scheduler.take_expired():
                self._drop(request)
            if plan is None:
                return
            self._device.send(plan, scheduler.rows.num_planned[plan.rows], self._now_ns)

    def _commit(self) -> None:
        for finished in self._scheduler.commit(self._device.take_result()).finished:
            with contextlib.suppress(KeyError):  # cancelled at this very moment
                del self._live[finished.request.key]
                self.result.num_in_time += 1
                self.result.num_tokens_in_time += finished.num_output_tokens

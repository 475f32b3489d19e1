"""One simulation: the service's scheduler, a simulated device, and the events between them.

Time costs nothing but device time: planning, the wire and sampling are free, so figures are those
of a device that never waits for its host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.simulate.device import SimulatedDevice
from blockyard.simulate.meter import Meter
from blockyard.simulate.prompts import Prompts
from blockyard.simulate.setup import Setup
from blockyard.simulate.trace import Trace, TraceError
from scheduler_svc.accounting import Accounting
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepOutput

_EPOCH: Final = 1
_CLOCK_START_NS: Final = 1
"""The scheduler's clock at virtual time 0: to it a time of 0 is one that has not come."""

OnFinished = Callable[[int], object]
"""Told how many requests just finished."""


@dataclass(slots=True)
class Served:
    """What became of each request. Columns [num_requests], in order of arrival."""

    first_token_ns: npt.NDArray[np.int64]
    finish_ns: npt.NDArray[np.int64]
    num_preemptions: npt.NDArray[np.int32]
    num_cached_tokens: npt.NDArray[np.int32]  # of the prompt, at first admission

    @classmethod
    def nothing_yet(cls, num_requests: int) -> Served:
        """Zeros; a time of 0 means not yet."""
        times, counts = np.zeros((2, num_requests), np.int64), np.zeros((2, num_requests), np.int32)
        return cls(times[0], times[1], counts[0], counts[1])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation measured. Times are virtual unless their name says otherwise."""

    trace: Trace  # the requests that were served
    num_skipped: int  # requests too long to be served at all
    setup: Setup
    served: Served
    meter: Meter
    final: Accounting
    num_steps: int
    end_ns: int
    busy_ns: int  # of the device
    wall_s: float = field(compare=False)


def simulate(trace: Trace, setup: Setup, on_finished: OnFinished = lambda _: None) -> Outcome:
    """Serve all requests of a trace that fit.

    Raises:
        TraceError: if none of them fits.
    """
    fitting = trace.fitting(setup.limits.max_total_tokens)
    if not len(fitting):
        longest = setup.limits.max_total_tokens
        raise TraceError(f"{trace.name}: no request fits {longest} tokens")
    started = time.perf_counter()
    simulation = _Simulation(fitting, setup, on_finished)
    simulation.run()
    return Outcome(
        fitting,
        len(trace) - len(fitting),
        setup,
        simulation.served,
        simulation.meter,
        simulation.scheduler.snapshot(),
        simulation.num_steps,
        simulation.now_ns,
        simulation.device.busy_ns,
        time.perf_counter() - started,
    )


class _Simulation:
    """The event loop: arrivals in order, plans ahead of the device, results as they end."""

    def __init__(self, trace: Trace, setup: Setup, on_finished: OnFinished) -> None:
        self.scheduler = Scheduler(setup.limits, setup.policy)
        self.scheduler.begin_epoch(_EPOCH, setup.limits)
        self.scheduler.set_cost_model(setup.profile.cost)
        self.device = SimulatedDevice(setup.profile, setup.limits.block_bytes)
        self.meter = Meter(self.scheduler, len(trace))
        self.served = Served.nothing_yet(len(trace))
        self.num_steps = 0
        self.now_ns = 0
        self._trace = trace
        self._prompts = Prompts(trace, setup.limits.vocab_size)
        self._setup = setup
        self._on_finished = on_finished
        self._num_submitted = 0

    def run(self) -> None:
        """Go from event to event until every request has finished."""
        while True:
            self._take_arrivals()
            self._plan_ahead()
            next_ns = self._next_event_ns()
            if next_ns is None:
                break
            self.meter.advance(next_ns, self.device.num_tokens_in_flight)
            self.now_ns = next_ns
            if next_ns == self.device.next_end_ns:
                self._commit()
        assert (self.served.finish_ns > 0).all(), "requests left, and nothing will happen"

    def _take_arrivals(self) -> None:
        """Submit who has arrived, as far ahead as the scheduler can admit in one step.

        It serves in order of arrival, so who waits further back changes nothing but memory.
        """
        trace, limit = self._trace, self._setup.limits.max_num_seqs
        while (
            self._num_submitted < len(trace)
            and trace.arrival_ns[self._num_submitted] <= self.now_ns
            and len(self.scheduler.waiting) < limit
        ):
            self.scheduler.submit(self._request(self._num_submitted))
            self._num_submitted += 1

    def _request(self, index: int) -> Request:
        prompt = self._prompts.of(index)
        return Request(
            key=index,
            frontend=0,
            request_id=index,
            prompt=prompt,
            max_total_tokens=len(prompt) + int(self._trace.num_output_tokens[index]),
            arrival_ns=int(self._trace.arrival_ns[index]),
        )

    def _plan_ahead(self) -> None:
        while len(self.device) < self._setup.window:
            plan = self.scheduler.plan(_CLOCK_START_NS + self.now_ns)
            if plan is None:
                return
            self.device.send(plan, self.scheduler.rows.num_planned[plan.rows], self.now_ns)
            self.num_steps += 1

    def _next_event_ns(self) -> int | None:
        """The next result or, if a plan could still be sent, the next arrival before it."""
        end_ns = self.device.next_end_ns
        if len(self.device) < self._setup.window and self._num_submitted < len(self._trace):
            arrival_ns = int(self._trace.arrival_ns[self._num_submitted])
            if arrival_ns > self.now_ns and (end_ns is None or arrival_ns < end_ns):
                return arrival_ns
        return end_ns

    def _commit(self) -> None:
        has_prefills = self.device.oldest_has_prefills
        output = self.scheduler.commit(self.device.take_result())
        if has_prefills:
            self._note_first_tokens(output)
        for finished in output.finished:
            request = finished.request
            index = request.request_id
            self.served.finish_ns[index] = self.now_ns
            self.served.num_preemptions[index] = request.branches[0].num_preemptions
            self.served.num_cached_tokens[index] = request.num_cached_tokens
        if output.finished:
            self._on_finished(len(output.finished))

    def _note_first_tokens(self, output: StepOutput) -> None:
        ids = output.request_ids.astype(np.int64)
        first = ids[self.served.first_token_ns[ids] == 0]
        self.served.first_token_ns[first] = self.now_ns

"""More is asked for than the pool holds: all of it is served, the oldest first, none too late."""

from __future__ import annotations

import random
from collections import deque
from typing import Final

import pytest

from executor_svc.backends.checking.runner import FakeRunner, fake_info
from integration_tests.sim_link import SimLink
from integration_tests.walk_books import check_books
from integration_tests.walk_request import RequestMaker, WalkRequest
from scheduler_svc import plan_codec
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.policy import MAX_PREEMPTIONS_UNRESERVED, Policy, PreemptionMode
from scheduler_svc.request import Branch, Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepOutput, StepPlan

WINDOW: Final = 2
SEEDS: Final = range(4)
FACTORS: Final = (1.3, 2.0, 8.0)
MAX_PREEMPTIONS: Final = MAX_PREEMPTIONS_UNRESERVED + 1

LIMITS: Final = Limits(
    num_device_blocks=65,
    block_size=4,
    max_num_seqs=64,  # so that memory is what is short
    max_num_batched_tokens=96,
    max_model_len=100,
    vocab_size=997,
    watermark_blocks=1,
    num_host_blocks=48,
    block_bytes=32,
)
CHEAP_SWAPS: Final = CostModel(1e6, 1e6, 0.0, 1e9)
DEAR_SWAPS: Final = CostModel(1e6, 1e3, 0.0, 1e3)


def peak_blocks(request: Request) -> int:
    """Blocks that the request holds at its longest, alone."""
    num_prompt, longest = request.num_prompt_tokens, request.max_total_tokens
    if request.beam is not None:
        return LIMITS.beam_blocks(num_prompt, longest, request.width)
    num_shared = num_prompt // LIMITS.block_size
    return num_shared + len(request.branches) * (LIMITS.blocks_for(longest - 1) - num_shared)


def workload(seed: int, factor: float) -> list[WalkRequest]:
    """Mixed requests that together need `factor` times the pool."""
    maker = RequestMaker(random.Random(seed))
    requests: list[WalkRequest] = []
    num_blocks = 0
    while num_blocks < factor * LIMITS.num_usable_blocks:
        request = maker.make(len(requests) + 1, LIMITS)
        for branch in request.branches:
            branch.stops_at = None
        requests.append(request)
        num_blocks += peak_blocks(request.request)
    return requests


class Service:
    """Scheduler and checking executor, which run all requests to their ends, one plan behind."""

    def __init__(self, requests: list[WalkRequest], mode: PreemptionMode, cost: CostModel) -> None:
        """Submit everything at once."""
        info = fake_info(
            LIMITS.num_device_blocks,
            LIMITS.num_host_blocks,
            block_size=LIMITS.block_size,
            max_rows=LIMITS.max_num_seqs,
            max_model_len=LIMITS.max_model_len,
            max_num_batched_tokens=LIMITS.max_num_batched_tokens,
            vocab_size=LIMITS.vocab_size,
        )
        self._link = SimLink(FakeRunner(info))
        self.requests = {request.request.key: request for request in requests}
        self.scheduler = Scheduler(LIMITS, Policy(mode))
        self.scheduler.set_cost_model(cost)
        self.scheduler.begin_epoch(self._link.epoch, LIMITS)
        for request in requests:
            self.scheduler.submit(request.request)
        self._oldest: Branch | None = None  # of those that run
        self._num_waited = 0  # plans since it was last scheduled

    def run(self) -> None:
        """Serve to the end. Raises AssertionError (StuckError is one) and PlanError."""
        scheduler, in_flight = self.scheduler, deque[StepPlan]()
        while scheduler.has_work or in_flight:
            if len(in_flight) < WINDOW and scheduler.has_work:
                plan = scheduler.plan(now_ns=scheduler.last_step_id)
                self._check(plan)
                if plan is not None:
                    in_flight.append(plan)
                    self._link.send(plan_codec.encode(plan))
                    self._link.deliver()
                    continue
            assert in_flight, "nothing moves"
            in_flight.popleft()
            self._commit()
        assert all(request.is_ended for request in self.requests.values())

    def _commit(self) -> None:
        self._link.complete()
        result = self._link.take()
        assert result is not None
        self._publish(self.scheduler.commit(plan_codec.decode(result)))

    def _publish(self, output: StepOutput) -> None:
        columns = (output.request_ids, output.branches, output.token_ids)
        for entry, (key, branch, token_id) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            self.requests[key].take_token(branch, token_id, output.logprobs.get(entry))
        for finished in output.finished:
            self.requests[finished.request.key].end(finished, LIMITS)

    def _check(self, plan: StepPlan | None) -> None:
        """The books are right, and the oldest running request gets on."""
        check_books(self.scheduler, [request.request for request in self.requests.values()])
        running = self.scheduler.running
        if not running:
            return
        oldest = running[min(running)]
        rows = {branch.row for branch in oldest.request.branches}
        is_scheduled = plan is not None and bool(rows & set(plan.rows.tolist()))
        if oldest is not self._oldest or is_scheduled:
            self._oldest, self._num_waited = oldest, 0
        else:
            self._num_waited += 1
        assert self._num_waited <= WINDOW, f"{self.requests[oldest.request.key]} waits"


def serve(seed: int, factor: float, mode: PreemptionMode, cost: CostModel) -> Service:
    """Serve one workload to its end."""
    service = Service(workload(seed, factor), mode, cost)
    service.run()
    return service


@pytest.mark.parametrize("mode", list(PreemptionMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("factor", FACTORS)
def test_everything_is_served_and_nobody_is_preempted_again_and_again(
    factor: float, mode: PreemptionMode
) -> None:
    num_preemptions = 0
    for seed in SEEDS:
        service = serve(seed, factor, mode, CHEAP_SWAPS)
        for request in service.requests.values():
            counts = [branch.num_preemptions for branch in request.request.branches]
            assert max(counts) <= MAX_PREEMPTIONS, (seed, request, counts)
            num_preemptions += sum(counts)
    assert num_preemptions, "nothing was short"


@pytest.mark.parametrize(
    ("mode", "cost", "swaps"),
    [
        (PreemptionMode.RECOMPUTE, CHEAP_SWAPS, False),
        (PreemptionMode.SWAP, DEAR_SWAPS, True),
        (PreemptionMode.AUTO, CHEAP_SWAPS, True),
        (PreemptionMode.AUTO, DEAR_SWAPS, False),
        (PreemptionMode.AUTO, CostModel(), False),  # no prices are known yet
    ],
)
def test_the_mode_and_the_prices_say_what_becomes_of_victims(
    mode: PreemptionMode, cost: CostModel, swaps: bool
) -> None:
    counters = serve(1, 8.0, mode, cost).scheduler.snapshot().counters
    assert bool(counters.num_preemptions_by_swap) == swaps
    assert swaps or counters.num_preemptions_by_recompute

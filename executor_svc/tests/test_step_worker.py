"""The two threads: order, overlap, refusals, faults, epochs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import FatalDeviceError, PendingStep, StepBatch, StepOutputs
from executor_svc.step_worker import StepWorker
from executor_svc.tests.plans import batch, decode_same, new_rows, prefill
from integration_tests.reference import reference_output

INFO = fake_info(64, block_size=4, max_rows=8, max_model_len=64)
PROMPT = [3, 1, 4, 1, 5]
Event = pb.StepResult | pb.PlanRejected | pb.Fault


class Events:
    """Collects what the worker tells, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.fatal: list[str] = []

    def on_result(self, result: pb.StepResult) -> None:
        self.queue.put_nowait(result)

    def on_rejected(self, rejected: pb.PlanRejected) -> None:
        self.queue.put_nowait(rejected)

    def on_fault(self, fault: pb.Fault, *, is_fatal: bool) -> None:
        self.queue.put_nowait(fault)
        if is_fatal:
            self.fatal.append(fault.message)

    async def next(self) -> Event:
        return await asyncio.wait_for(self.queue.get(), 5)

    async def token(self, step_id: int) -> int:
        event = await self.next()
        assert isinstance(event, pb.StepResult), event
        assert event.step_id == step_id
        return event.token_ids[0]


class GatedRunner(FakeRunner):
    """Steps complete when the gate opens."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.gate = threading.Event()
        self.launched = threading.Semaphore(0)

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        step = super().launch(plan, state, batch)
        self.launched.release()
        return _Gated(step, self.gate)


class _Gated:
    def __init__(self, step: PendingStep, gate: threading.Event) -> None:
        self._step, self._gate = step, gate

    def wait(self) -> StepOutputs:
        assert self._gate.wait(5)
        return self._step.wait()


Start = Callable[[FakeRunner], tuple[StepWorker, Events]]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    workers: list[StepWorker] = []

    def run(runner: FakeRunner) -> tuple[StepWorker, Events]:
        events = Events()
        worker = StepWorker(runner, events)
        workers.append(worker)
        worker.start(asyncio.get_running_loop())
        worker.begin_epoch(1)
        return worker, events

    yield run
    for worker in workers:
        await asyncio.to_thread(worker.stop)


def failing(number: int, error: Exception, *, in_wait: bool = False) -> FakeRunner:
    return FakeRunner(INFO, FakeOptions(failures={number: error}, fails_in_wait=in_wait))


def submit_three(worker: StepWorker, epoch: int = 1) -> None:
    worker.submit(prefill(1, epoch, 0, PROMPT, [1, 2]))
    worker.submit(decode_same(2, epoch))
    worker.submit(decode_same(3, epoch))


async def test_results_come_in_order_with_timings(start: Start) -> None:
    worker, events = start(FakeRunner(INFO, FakeOptions(step_s=0.005)))
    submit_three(worker)
    results = [await events.next() for _ in range(3)]
    tokens = [r.token_ids[0] for r in results if isinstance(r, pb.StepResult)]
    assert tokens == reference_output(PROMPT, 3, INFO.vocab_size)
    last = results[-1]
    assert isinstance(last, pb.StepResult)
    assert last.timings.forward_ns == 5_000_000
    assert last.timings.apply_ns > 0
    assert last.timings.queue_ns > 0
    assert last.timings.idle_ns < 5_000_000


async def test_launching_does_not_wait_for_results(start: Start) -> None:
    runner = GatedRunner()
    worker, events = start(runner)
    submit_three(worker)
    for _ in range(3):
        assert await asyncio.to_thread(runner.launched.acquire, timeout=5)
    assert events.queue.empty()
    runner.gate.set()
    assert [await events.token(i) for i in (1, 2, 3)]


async def test_a_refused_plan_has_no_effect_and_may_be_replaced(start: Start) -> None:
    worker, events = start(FakeRunner(INFO))
    worker.submit(prefill(1, 1, 0, PROMPT, [1, 2]))
    worker.submit(prefill(2, 1, 0, PROMPT, [1, 2]))
    worker.submit(decode_same(3, 1))
    expected = reference_output(PROMPT, 2, INFO.vocab_size)
    assert await events.token(1) == expected[0]
    for step_id, reason in ((2, "row is live"), (3, "follows a rejected plan")):
        rejected = await events.next()
        assert isinstance(rejected, pb.PlanRejected)
        assert (rejected.step_id, rejected.expected_step_id) == (step_id, 2)
        assert reason in rejected.reason
    worker.submit(decode_same(2, 1))
    assert await events.token(2) == expected[1]


async def test_malformed_plans_are_refused(start: Start) -> None:
    worker, events = start(FakeRunner(INFO))
    worker.submit(pb.StepPlan(epoch=1, step_id=1, forks=pb.Forks(src_rows=[1])))
    rejected = await events.next()
    assert isinstance(rejected, pb.PlanRejected)
    assert "forks.dst_rows" in rejected.reason


@pytest.mark.parametrize("in_wait", [False, True])
async def test_a_fault_ends_the_epoch_and_the_next_one_works(start: Start, in_wait: bool) -> None:
    worker, events = start(failing(2, RuntimeError("boom"), in_wait=in_wait))
    submit_three(worker)
    first = reference_output(PROMPT, 1, INFO.vocab_size)
    assert [await events.token(1)] == first
    fault = await events.next()
    assert isinstance(fault, pb.Fault)
    assert (fault.epoch, fault.step_id, fault.message) == (1, 2, "RuntimeError: boom")
    assert not events.fatal
    worker.begin_epoch(2)
    worker.submit(prefill(1, 2, 0, PROMPT, [1, 2]))
    result = await events.next()
    assert isinstance(result, pb.StepResult), "nothing else of the first epoch"
    assert (result.epoch, list(result.token_ids)) == (2, first)


@pytest.mark.parametrize("in_wait", [False, True])
async def test_a_lost_device_is_fatal(start: Start, in_wait: bool) -> None:
    worker, events = start(failing(1, FatalDeviceError("gone"), in_wait=in_wait))
    submit_three(worker)
    assert isinstance(await events.next(), pb.Fault)
    assert events.fatal == ["FatalDeviceError: gone"]


async def test_a_new_epoch_waits_for_steps_under_way(start: Start) -> None:
    runner = GatedRunner()
    worker, events = start(runner)
    submit_three(worker)
    for _ in range(3):
        assert await asyncio.to_thread(runner.launched.acquire, timeout=5)
    worker.begin_epoch(2)
    worker.submit(prefill(1, 2, 0, PROMPT, [1, 2]))
    assert not await asyncio.to_thread(runner.launched.acquire, timeout=0.05)
    runner.gate.set()
    tokens = [await events.token(i) for i in (1, 2, 3, 1)]
    assert tokens[3] == tokens[0]


async def test_queued_plans_of_an_old_epoch_are_dropped(start: Start) -> None:
    worker, events = start(FakeRunner(INFO, FakeOptions(busy_s=0.05)))
    submit_three(worker)
    worker.begin_epoch(2)
    worker.submit(prefill(1, 2, 0, PROMPT, [1, 2]))
    while True:
        event = await events.next()
        assert isinstance(event, pb.StepResult)
        if event.epoch == 2:
            break
        assert event.step_id == 1, "only the step that was being launched"


async def test_results_extend_histories(start: Start) -> None:
    class HistoryRunner(FakeRunner):
        histories: list[list[int]]

        def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
            self.histories = [*getattr(self, "histories", []), state.history(0).tolist()]
            return super().launch(plan, state, batch)

    runner = HistoryRunner(INFO)
    worker, events = start(runner)
    row = {"row": 0, "tokens": PROMPT, "blocks": [1, 2], "flags": pb.ROW_FLAG_HISTORY}
    plan = pb.StepPlan(epoch=1, step_id=1, new_rows=new_rows(row), batch=batch((0, 5)))
    worker.submit(plan)
    tokens = [await events.token(1)]
    worker.submit(decode_same(2, 1))
    tokens.append(await events.token(2))
    worker.submit(decode_same(3, 1))
    await events.token(3)
    assert runner.histories == [PROMPT, [*PROMPT, tokens[0]], [*PROMPT, *tokens]]


async def test_many_steps_feed_the_cost_model(start: Start) -> None:
    worker, events = start(FakeRunner(INFO, FakeOptions(step_s=0.0001)))
    assert worker.cost_model() == pb.CostModel()
    for step_id in range(1, 60):
        if step_id % 2:
            again = prefill(step_id, 1, 0, PROMPT, [1, 2])
            again.freed_rows.extend([0] if step_id > 1 else [])
            worker.submit(again)
        else:
            worker.submit(decode_same(step_id, 1))
        await events.token(step_id)
    assert worker.cost_model().step_ns > 0

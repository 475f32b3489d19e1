"""The executor client against a scripted executor: every way in which a link can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc.executor_client import (
    ExecutorClient,
    LinkState,
    LinkTimeouts,
    PlanRejectedError,
    SessionEndedError,
)
from scheduler_svc.tests.scripted_executor import (
    RecordingHandler,
    ScriptedExecutor,
    Session,
    serve,
)

EPOCH = 100
TIMEOUTS = LinkTimeouts(heartbeat_s=0.6, progress_s=0.3, beat_s=0.05)


class Link:
    """A client under test, its handler and the executor it talks to."""

    def __init__(self, address: str, **options: Any) -> None:
        self.handler = RecordingHandler()
        self.executor = ScriptedExecutor()
        self.address = address
        self.client = ExecutorClient(address, self.handler, TIMEOUTS, **options)
        self.task: asyncio.Task[None] | None = None
        self._servers: list[grpc.aio.Server] = []

    async def serve(self) -> None:
        """Let the executor appear, or a new one in place of the old."""
        self._servers.append(await serve(self.executor, self.address))

    async def session(self) -> Session:
        """The next stream that the client opens."""
        return await asyncio.wait_for(self.executor.sessions.get(), 10)

    async def open(self, epoch: int = EPOCH, applied_step_id: int = 0) -> Session:
        """The next stream, opened."""
        session = await self.session()
        session.opened(epoch, applied_step_id)
        await self.handler.state(LinkState.READY)
        return session

    def run(self) -> None:
        """Start the client."""
        self.task = asyncio.create_task(self.client.run())

    def send(self, *step_ids: int) -> None:
        """Send plans of the client's epoch."""
        for step_id in step_ids:
            self.client.send(pb.StepPlan(epoch=self.client.epoch, step_id=step_id))

    async def lose_executor(self) -> None:
        """The executor's process is gone."""
        await self._servers.pop().stop(None)

    async def close(self) -> None:
        """End the client, then the executor."""
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, PlanRejectedError):
                await self.task
        for server in self._servers:
            await server.stop(None)


@pytest_asyncio.fixture
async def make_link(tmp_path: Path) -> AsyncIterator[Callable[..., Link]]:
    links: list[Link] = []

    def make(**options: Any) -> Link:
        links.append(Link(f"unix:{tmp_path}/executor.sock", **options))
        return links[-1]

    yield make
    for link in links:
        await link.close()


@pytest_asyncio.fixture
async def link(make_link: Callable[..., Link]) -> Link:
    """A running client with its executor there."""
    link = make_link()
    await link.serve()
    link.run()
    return link


async def plan_ids(session: Session, count: int) -> list[int]:
    """Step ids of the next plans that the executor gets."""
    async with asyncio.timeout(10):
        return [(await session.plans.get()).step_id for _ in range(count)]


async def test_open_names_version_scheduler_and_model(link: Link) -> None:
    opening = (await link.open()).opening
    assert opening.protocol_version == EXECUTOR_PROTOCOL_VERSION
    assert opening.scheduler_id == link.client.scheduler_id != 0
    assert (opening.epoch, opening.last_committed_step_id) == (0, 0)
    assert not opening.reset
    assert opening.model_digest == "d1"
    assert link.handler.epochs == [EPOCH]


async def test_plans_go_out_and_results_come_in(link: Link) -> None:
    session = await link.open()
    link.send(1, 2)
    assert await plan_ids(session, 2) == [1, 2]
    assert link.client.num_in_flight == 2
    session.result(EPOCH, 1)
    session.result(EPOCH, 2)
    await link.handler.result(2)
    assert link.handler.results == [1, 2]
    assert link.client.num_in_flight == 0


async def test_a_result_that_comes_twice_is_taken_once(link: Link) -> None:
    session = await link.open()
    link.send(1, 2, 3)
    for step_id in (1, 1, 2, 1, 2, 3):
        session.result(EPOCH, step_id)
    session.result(EPOCH - 1, 3)
    await link.handler.result(3)
    assert link.handler.results == [1, 2, 3]


async def test_a_broken_stream_is_reopened_where_it_ended(link: Link) -> None:
    session = await link.open()
    link.send(1, 2, 3)
    session.result(EPOCH, 1)
    await link.handler.result(1)
    session.end()
    session = await link.session()
    assert (session.opening.epoch, session.opening.last_committed_step_id) == (EPOCH, 1)
    assert not session.opening.reset
    session.opened(EPOCH, applied_step_id=2)
    session.result(EPOCH, 2)
    assert await plan_ids(session, 1) == [3]  # the executor has 2 already
    session.result(EPOCH, 3)
    await link.handler.result(3)
    assert link.handler.results == [1, 2, 3]
    assert link.handler.epochs == [EPOCH]


async def test_an_idle_link_reopens_with_its_last_result(link: Link) -> None:
    session = await link.open()
    link.send(1)
    session.result(EPOCH, 1)
    await link.handler.result(1)
    session.end()
    assert (await link.session()).opening.last_committed_step_id == 1


async def test_a_new_epoch_drops_what_was_in_flight(link: Link) -> None:
    session = await link.open()
    link.send(1, 2)
    session.end()
    session = await link.session()
    session.opened(EPOCH + 1)
    await link.handler.state(LinkState.READY)
    assert link.handler.epochs == [EPOCH, EPOCH + 1]
    assert link.client.num_in_flight == 0
    link.send(1)
    assert await plan_ids(session, 1) == [1]


async def test_silence_is_noticed_within_the_heartbeat_timeout(link: Link) -> None:
    await link.open()
    begin = asyncio.get_running_loop().time()
    assert "silent" in await link.handler.state(LinkState.UNRESPONSIVE)
    assert asyncio.get_running_loop().time() - begin < 3 * TIMEOUTS.heartbeat_s
    await link.open()  # the client goes on trying, and the executor wakes up
    assert link.handler.epochs == [EPOCH]


async def test_heartbeats_keep_an_idle_link_up_both_ways(link: Link) -> None:
    session = await link.open()
    for _ in range(8):
        await asyncio.sleep(TIMEOUTS.heartbeat_s / 4)
        session.send(heartbeat=pb.Heartbeat())
    assert [state for state, _ in link.handler.states][-1] is LinkState.READY
    assert session.num_heartbeats >= 1


async def test_heartbeats_bring_prices(link: Link) -> None:
    session = await link.open()
    session.send(heartbeat=pb.Heartbeat(cost_model=pb.CostModel(step_ns=5.0, token_ns=2.0)))
    prices = await link.handler.cost_model()
    assert (prices.step_ns, prices.token_ns) == (5.0, 2.0)


async def test_a_step_that_never_ends_is_noticed_though_heartbeats_come(link: Link) -> None:
    session = await link.open()
    await asyncio.sleep(TIMEOUTS.progress_s * 1.5)  # without plans this is no lack of progress
    link.send(1)
    await plan_ids(session, 1)
    for _ in range(10):
        await asyncio.sleep(TIMEOUTS.progress_s / 5)
        session.send(heartbeat=pb.Heartbeat(applied_step_id=1))
    assert "step 1 has not ended" in await link.handler.state(LinkState.UNRESPONSIVE)


@pytest.mark.parametrize(
    "frame",
    [
        {"fault": pb.Fault(epoch=EPOCH, step_id=1, message="device lost")},
        {"rejected": pb.PlanRejected(epoch=EPOCH, step_id=1, reason="row twice")},
    ],
    ids=["fault", "rejected"],
)
async def test_a_fault_or_rejection_asks_for_a_new_epoch(frame: dict[str, Any], link: Link) -> None:
    session = await link.open()
    link.send(1)
    session.send(**frame)
    session = await link.session()
    assert session.opening.reset
    state, message = link.handler.states[-1]
    assert state is LinkState.CONNECTING
    assert "device lost" in message or "row twice" in message
    session.opened(EPOCH + 1)
    await link.handler.state(LinkState.READY)
    session.end()
    assert not (await link.session()).opening.reset  # asked once


async def test_a_reset_that_was_not_answered_is_asked_again(link: Link) -> None:
    session = await link.open()
    session.send(fault=pb.Fault(epoch=EPOCH, message="device lost"))
    (await link.session()).end()
    assert (await link.session()).opening.reset


async def test_a_strict_client_raises_on_rejection(make_link: Callable[..., Link]) -> None:
    link = make_link(strict=True)
    await link.serve()
    link.run()
    session = await link.open()
    link.send(1)
    session.send(rejected=pb.PlanRejected(epoch=EPOCH, step_id=1, reason="row twice"))
    assert link.task is not None
    with pytest.raises(PlanRejectedError, match="row twice"):
        await asyncio.wait_for(link.task, 10)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (pb.DescribeResponse(protocol_version=EXECUTOR_PROTOCOL_VERSION + 1), "protocol"),
        (
            pb.DescribeResponse(protocol_version=EXECUTOR_PROTOCOL_VERSION, model_digest="another"),
            "digest another",
        ),
    ],
    ids=["protocol", "model"],
)
async def test_an_incompatible_executor_is_named_until_the_right_one_appears(
    description: pb.DescribeResponse, message: str, make_link: Callable[..., Link]
) -> None:
    link = make_link()
    right, link.executor.description = link.executor.description, description
    await link.serve()
    link.run()
    assert message in await link.handler.state(LinkState.INCOMPATIBLE)
    assert link.executor.sessions.empty()
    link.executor.description = right
    await link.open()
    assert link.handler.epochs == [EPOCH]


async def test_a_refused_open_counts_as_incompatible(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.executor.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "model digest differs")
    await link.serve()
    link.run()
    assert "model digest differs" in await link.handler.state(LinkState.INCOMPATIBLE)
    link.executor.refusal = (grpc.StatusCode.ABORTED, "another scheduler's stream is live")
    assert "another scheduler" in await link.handler.state(LinkState.CONNECTING)
    link.executor.refusal = None
    await link.open()


async def test_an_executor_may_come_later(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.run()
    assert "UNAVAILABLE" in await link.handler.state(LinkState.CONNECTING)
    await link.serve()
    await link.open()
    await link.lose_executor()
    await link.handler.state(LinkState.CONNECTING)
    await link.serve()
    await link.open(EPOCH + 1)
    assert link.handler.epochs == [EPOCH, EPOCH + 1]


async def test_plans_need_an_open_link(make_link: Callable[..., Link]) -> None:
    link = make_link()
    with pytest.raises(AssertionError):
        link.send(1)


@pytest.mark.parametrize("num_slow_turns", range(4))
async def test_a_cancellation_is_not_lost_to_an_error_that_comes_meanwhile(
    make_link: Callable[..., Link], monkeypatch: pytest.MonkeyPatch, num_slow_turns: int
) -> None:
    """The session's tasks are still ending, for an error, when the link is cancelled."""
    link, has_failed = make_link(), asyncio.Event()

    async def fail(_: Any) -> None:
        has_failed.set()
        raise SessionEndedError("the stream broke")

    async def end_slowly(_: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            for _turn in range(num_slow_turns):
                await asyncio.sleep(0)

    monkeypatch.setattr(link.client, "_receive", fail)
    monkeypatch.setattr(link.client, "_write", end_slowly)
    await link.serve()
    running = asyncio.create_task(link.client.run())
    (await link.session()).opened(EPOCH)
    await asyncio.wait_for(has_failed.wait(), 10)
    running.cancel()
    _, late = await asyncio.wait([running], timeout=5)
    assert not late
    assert running.cancelled()

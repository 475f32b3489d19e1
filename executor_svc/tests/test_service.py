"""The step stream over a real socket: opening, resuming, replacing, refusing, faults."""

from __future__ import annotations

import asyncio
import pathlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner
from executor_svc.runner import FatalDeviceError
from executor_svc.service import ExecutorServicer
from executor_svc.tests.plans import decode_same, prefill
from executor_svc.tests.stream_peer import BLOCKS, INFO, PROMPT, Server
from integration_tests.reference import reference_output

EXPECTED = reference_output(PROMPT, 12, INFO.vocab_size)
BEAT_S = 0.05


Start = Callable[..., Awaitable[Server]]


@pytest_asyncio.fixture
async def start(tmp_path: pathlib.Path) -> AsyncIterator[Start]:
    stops: list[Callable[[], Awaitable[None]]] = []

    async def run(**options: Any) -> Server:
        servicer = ExecutorServicer(FakeRunner(INFO, FakeOptions(**options)), BEAT_S)
        grpc_server = grpc.aio.server(options=LINK_OPTIONS)
        pb_grpc.add_ExecutorServiceServicer_to_server(servicer, grpc_server)
        target = f"unix:{tmp_path}/{len(stops)}.sock"
        grpc_server.add_insecure_port(target)
        server = Server(servicer, servicer.start(), target)
        await grpc_server.start()

        async def stop() -> None:
            await server.close_clients()
            await servicer.stop()
            await grpc_server.stop(None)

        stops.append(stop)
        return server

    yield run
    for stop in stops:
        await stop()


async def test_describe(start: Start) -> None:
    described = await (await start()).stub().Describe(pb.DescribeRequest())
    for name in INFO.__dataclass_fields__.keys() - {"swap_bytes_per_s"}:  # a price: cost_model's
        assert getattr(described, name) == getattr(INFO, name), name
    assert described.protocol_version == EXECUTOR_PROTOCOL_VERSION
    assert described.cost_model == pb.CostModel()


async def test_steps_run_and_heartbeats_flow(start: Start) -> None:
    client = (await start(step_s=3 * BEAT_S)).client()
    opened = await client.open()
    assert opened.epoch > 0
    assert opened.applied_step_id == 0
    await client.begin()
    await client.decode(2)
    assert [await client.token(i) for i in (1, 2)] == EXPECTED[:2]
    during = {(beat.applied_step_id, beat.completed_step_id) for beat in client.heartbeats}
    assert (2, 0) in during
    assert (2, 1) in during


REFUSED_OPENS: dict[str, tuple[grpc.StatusCode, pb.RunRequest]] = {
    "first frame must be Open": (
        grpc.StatusCode.INVALID_ARGUMENT,
        pb.RunRequest(plan=pb.StepPlan(step_id=1)),
    ),
    "must be Open": (grpc.StatusCode.INVALID_ARGUMENT, pb.RunRequest()),
    "protocol version": (
        grpc.StatusCode.FAILED_PRECONDITION,
        pb.RunRequest(open=pb.Open(protocol_version=EXECUTOR_PROTOCOL_VERSION + 1)),
    ),
    "model digest": (
        grpc.StatusCode.FAILED_PRECONDITION,
        pb.RunRequest(
            open=pb.Open(protocol_version=EXECUTOR_PROTOCOL_VERSION, model_digest="other")
        ),
    ),
}


@pytest.mark.parametrize("message", REFUSED_OPENS)
async def test_refused_opens(message: str, start: Start) -> None:
    code, request = REFUSED_OPENS[message]
    server = await start()
    client = server.client()
    await client.call.write(request)
    assert message in await client.ends_with(code)
    await server.client().open(model_digest=INFO.model_digest)


async def test_a_stream_without_frames(start: Start) -> None:
    client = (await start()).client()
    await client.call.done_writing()
    await client.ends_with(grpc.StatusCode.INVALID_ARGUMENT)


async def test_frames_that_do_not_belong(start: Start) -> None:
    server = await start()
    for request in (pb.RunRequest(open=pb.Open(scheduler_id=1)), pb.RunRequest()):
        client = server.client()
        await client.open()
        await client.call.write(request)
        assert "inside a stream" in await client.ends_with(grpc.StatusCode.INVALID_ARGUMENT)


async def test_half_close_ends_the_stream(start: Start) -> None:
    client = (await start()).client()
    await client.open()
    await client.call.done_writing()
    await client.ends_with(grpc.StatusCode.OK)


async def test_gap_and_wrong_epoch_are_refused(start: Start) -> None:
    client = (await start()).client()
    await client.open()
    await client.begin()
    await client.token(1)
    await client.decode(3)
    rejected = (await client.next()).rejected
    assert (rejected.step_id, rejected.expected_step_id) == (3, 2)
    await client.send(decode_same(2, client.epoch + 1))
    rejected = (await client.next()).rejected
    assert "epoch" in rejected.reason
    assert rejected.expected_step_id == 2
    await client.decode(2)
    assert await client.token(2) == EXPECTED[1]


async def test_a_plan_that_breaks_the_contract_is_refused(start: Start) -> None:
    client = (await start()).client()
    await client.open()
    await client.begin()
    await client.token(1)
    await client.send(prefill(2, client.epoch, 0, PROMPT, BLOCKS))
    rejected = (await client.next()).rejected
    assert (rejected.step_id, rejected.expected_step_id) == (2, 2)
    assert "row is live" in rejected.reason
    await client.decode(2)
    assert await client.token(2) == EXPECTED[1]


async def test_repeated_plans_get_kept_results(start: Start) -> None:
    client = (await start()).client()
    await client.open()
    await client.begin()
    assert await client.token(1) == EXPECTED[0]
    for step_id in range(2, 7):
        await client.decode(step_id)
        assert await client.token(step_id) == EXPECTED[step_id - 1]
    for step_id in (3, 6):
        await client.decode(step_id)
        assert await client.token(step_id) == EXPECTED[step_id - 1]
    await client.decode(2)
    assert "no longer kept" in (await client.next()).rejected.reason


async def test_a_broken_stream_is_resumed(start: Start) -> None:
    server = await start(step_s=0.02)
    first = server.client()
    await first.open()
    await first.begin()
    assert await first.token(1) == EXPECTED[0]
    await first.decode(2)
    await first.decode(3)
    await asyncio.sleep(0.01)
    first.call.cancel()  # with two steps under way
    await asyncio.sleep(0.1)
    second = server.client()
    opened = await second.open(epoch=first.epoch, last_committed_step_id=1)
    assert (opened.epoch, opened.applied_step_id) == (first.epoch, 3)
    assert [await second.token(i) for i in (2, 3)] == EXPECTED[1:3]
    await second.decode(4)
    assert await second.token(4) == EXPECTED[3]


async def test_the_same_scheduler_replaces_its_stream(start: Start) -> None:
    server = await start(step_s=0.05)
    first, second = server.client(), server.client()
    await first.open()
    await first.begin()
    await asyncio.sleep(0.01)
    opened = await second.open(epoch=first.epoch)
    assert (opened.epoch, opened.applied_step_id) == (first.epoch, 1)
    assert "replaced" in await first.ends_with(grpc.StatusCode.ABORTED)
    assert await second.token(1) == EXPECTED[0], "to the new stream, once"
    await second.decode(2)
    assert await second.token(2) == EXPECTED[1]


async def test_another_scheduler_waits_for_silence(start: Start) -> None:
    server = await start()
    first = server.client()
    await first.open(scheduler_id=1)
    other = server.client()
    await other.call.write(
        pb.RunRequest(open=pb.Open(protocol_version=EXECUTOR_PROTOCOL_VERSION, scheduler_id=2))
    )
    await other.ends_with(grpc.StatusCode.ABORTED)
    await asyncio.sleep(1.5 * BEAT_S)
    await first.call.write(pb.RunRequest(heartbeat=pb.Heartbeat()))
    await asyncio.sleep(1.5 * BEAT_S)
    await first.begin()
    assert await first.token(1) == EXPECTED[0], "a heartbeat kept it alive"
    await asyncio.sleep(3 * BEAT_S)
    third = server.client()
    opened = await third.open(scheduler_id=3)
    assert opened.epoch > first.epoch
    assert opened.applied_step_id == 0
    await first.ends_with(grpc.StatusCode.ABORTED)


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler_id": 2},
        {"reset": True},
        {"epoch": 0},
        {"last_committed_step_id": 0},  # its result is no longer kept
        {"last_committed_step_id": 99},
    ],
)
async def test_what_begins_a_new_epoch(change: dict[str, Any], start: Start) -> None:
    server = await start()
    first = server.client()
    await first.open(scheduler_id=1)
    await first.begin()
    assert await first.token(1) == EXPECTED[0]
    for step_id in range(2, 7):
        await first.decode(step_id)
        assert await first.token(step_id) == EXPECTED[step_id - 1]
    await first.call.done_writing()
    await first.ends_with(grpc.StatusCode.OK)
    fields = {"scheduler_id": 1, "epoch": first.epoch, "last_committed_step_id": 6, **change}
    second = server.client()
    opened = await second.open(**fields)
    assert opened.epoch > first.epoch
    assert opened.applied_step_id == 0
    await second.begin()  # row 0 is free again
    assert await second.token(1) == EXPECTED[0]


async def test_a_fault_ends_stream_and_epoch(start: Start) -> None:
    server = await start(failures={2: RuntimeError("boom")})
    first = server.client()
    await first.open()
    await first.begin()
    await first.token(1)
    await first.decode(2)
    await first.decode(3)
    fault = (await first.next()).fault
    assert (fault.epoch, fault.step_id) == (first.epoch, 2)
    assert "boom" in fault.message
    await first.ends_with(grpc.StatusCode.OK)
    second = server.client()
    assert (await second.open(epoch=first.epoch, last_committed_step_id=1)).epoch > first.epoch
    await second.begin()
    assert await second.token(1) == EXPECTED[0]
    assert not server.fatal.done()


async def test_a_fault_while_no_stream_is_up(start: Start) -> None:
    server = await start(failures={1: RuntimeError("boom")}, fails_in_wait=True, step_s=0.05)
    first = server.client()
    await first.open()
    await first.begin()
    await asyncio.sleep(0.01)
    first.call.cancel()
    await asyncio.sleep(0.1)
    second = server.client()
    assert (await second.open(epoch=first.epoch)).epoch > first.epoch


async def test_a_lost_device_is_reported(start: Start) -> None:
    server = await start(failures={1: FatalDeviceError("gone")})
    client = server.client()
    await client.open()
    await client.begin()
    assert "gone" in (await client.next()).fault.message
    assert "gone" in await asyncio.wait_for(server.fatal, 5)


async def test_shutdown_ends_the_stream(start: Start) -> None:
    server = await start()
    client = server.client()
    await client.open()
    await server.servicer.stop()
    assert "shutting down" in await client.ends_with(grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("seed", range(3))
async def test_random_cuts_lose_and_repeat_nothing(seed: int, start: Start) -> None:
    """A scheduler of window 2 whose stream breaks again and again."""
    rng = random.Random(seed)
    server = await start(step_s=0.002)
    tokens: list[int] = []
    epoch, num_streams = 0, 0
    while len(tokens) < len(EXPECTED):
        client = server.client()
        opened = await client.open(epoch=epoch, last_committed_step_id=len(tokens))
        num_streams += 1
        assert epoch in (0, opened.epoch)
        epoch, sent = opened.epoch, opened.applied_step_id
        until = len(tokens) + rng.randint(0, 4)
        while len(tokens) < min(until, len(EXPECTED)):
            while sent < min(len(tokens) + 2, len(EXPECTED)):
                sent += 1
                await (client.begin() if sent == 1 else client.decode(sent))
            tokens.append(await client.token(len(tokens) + 1))
        if rng.random() < 0.5:
            client.call.cancel()
            await asyncio.sleep(rng.random() * 0.005)
    assert tokens == EXPECTED
    assert num_streams > 3

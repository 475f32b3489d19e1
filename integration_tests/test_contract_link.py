"""The wire contract of the step stream: describing, opening, replacing, resuming."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION, HEARTBEAT_INTERVAL_S
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from executor_svc.tests.plans import decode_same, prefill
from integration_tests.harness import executor_in_process
from integration_tests.reference import reference_output
from integration_tests.step_stream import StepStream

INFO: Final = fake_info(32, block_size=4, max_rows=4, max_model_len=64)
PROMPT: Final = [3, 1, 4, 1, 5]
EXPECTED: Final = reference_output(PROMPT, 8, INFO.vocab_size)


def begin() -> pb.StepPlan:
    """The prompt, with blocks for what follows."""
    return prefill(0, 0, 0, PROMPT, [1, 2, 3, 4])


def decode() -> pb.StepPlan:
    """One more token."""
    return decode_same(0, 0)


@pytest_asyncio.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """An executor's address."""
    address = f"unix:{tmp_path}/executor.sock"
    async with executor_in_process(FakeRunner(INFO), address):
        yield address


async def ends_with(stream: StepStream) -> grpc.aio.AioRpcError:
    """The status that the stream ends with, after the frames that are left."""
    try:
        for _ in range(100):
            await stream.next()
    except grpc.aio.AioRpcError as error:
        return error
    pytest.fail("the stream did not end")


async def test_describe_is_answered_before_any_stream(address: str) -> None:
    async with StepStream(address) as stream:
        answer = await stream.stub.Describe(pb.DescribeRequest())
    for name in ("model_digest", "vocab_size", "max_model_len", "block_size", "max_rows"):
        assert getattr(answer, name) == getattr(INFO, name)
    assert answer.num_device_blocks == INFO.num_device_blocks
    assert answer.protocol_version == EXECUTOR_PROTOCOL_VERSION


@pytest.mark.parametrize(
    "frame",
    [pb.RunRequest(heartbeat=pb.Heartbeat()), pb.RunRequest(plan=pb.StepPlan()), pb.RunRequest()],
)
async def test_the_first_frame_must_be_open(frame: pb.RunRequest, address: str) -> None:
    async with StepStream(address) as stream:
        await stream.write(frame)
        error = await ends_with(stream)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Open" in str(error.details())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol_version": EXECUTOR_PROTOCOL_VERSION + 1}, "protocol version"),
        ({"protocol_version": 0}, "protocol version"),
        ({"model_digest": "another"}, "model digest another"),
    ],
)
async def test_versions_and_models_must_agree(
    fields: dict[str, Any], message: str, address: str
) -> None:
    async with StepStream(address) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.open(**fields)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message in str(caught.value.details())


async def test_the_same_scheduler_replaces_its_stream_at_once(address: str) -> None:
    async with StepStream(address) as old, StepStream(address) as new:
        await old.open()
        await old.run(1, begin())
        opened = await new.open(epoch=old.epoch, last_committed_step_id=1)
        assert (opened.epoch, opened.applied_step_id) == (old.epoch, 1)
        assert (await ends_with(old)).code() is grpc.StatusCode.ABORTED
        assert await new.run(2, decode()) == EXPECTED[1:2]


async def test_results_after_the_last_committed_step_are_replayed(address: str) -> None:
    async with StepStream(address) as old, StepStream(address) as new:
        await old.open()
        await old.run(1, begin())
        for step_id in (2, 3, 4):
            await old.run(step_id, decode())
        opened = await new.open(epoch=old.epoch, last_committed_step_id=2)
        assert opened.applied_step_id == 4
        assert [await new.tokens(3), await new.tokens(4)] == [EXPECTED[2:3], EXPECTED[3:4]]
        assert await new.run(5, decode()) == EXPECTED[4:5]


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler_id": 2},
        {"reset": True},
        {"epoch": 7},
        {"last_committed_step_id": 99},
    ],
    ids=str,
)
async def test_whatever_cannot_go_on_begins_an_epoch_without_rows(
    fields: dict[str, Any], address: str
) -> None:
    async with StepStream(address) as old:
        await old.open()
        await old.run(1, begin())
        epoch = old.epoch
    async with StepStream(address) as new:
        opened = await new.open(**{"epoch": epoch, "last_committed_step_id": 1, **fields})
        assert opened.epoch > epoch
        assert opened.applied_step_id == 0
        assert "batch is empty" in (await new.rejected(1, decode())).reason
        assert await new.run(1, begin()) == EXPECTED[:1]


async def test_another_scheduler_waits_for_two_missed_heartbeats(address: str) -> None:
    async with StepStream(address) as old:
        await old.open(scheduler_id=1)
        async with StepStream(address) as early:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await early.open(scheduler_id=2)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert await old.run(1, begin()) == EXPECTED[:1]  # not disturbed
        await asyncio.sleep(2 * HEARTBEAT_INTERVAL_S + 0.1)
        async with StepStream(address) as late:
            assert (await late.open(scheduler_id=2)).epoch > old.epoch
            assert (await ends_with(old)).code() is grpc.StatusCode.ABORTED


async def test_heartbeats_flow_while_a_step_runs(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/slow.sock"
    runner = FakeRunner(INFO, FakeOptions(step_s=1.5 * HEARTBEAT_INTERVAL_S))
    async with executor_in_process(runner, address), StepStream(address) as stream:
        await stream.open()
        await stream.run(1, begin())
        beats = [(beat.applied_step_id, beat.completed_step_id) for beat in stream.heartbeats]
    assert (1, 0) in beats


async def test_a_fault_ends_the_epoch_and_the_stream(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/faulty.sock"
    runner = FakeRunner(INFO, FakeOptions(failures={2: RuntimeError("asked to fail")}))
    async with executor_in_process(runner, address):
        async with StepStream(address) as stream:
            await stream.open()
            await stream.run(1, begin())
            await stream.send(2, decode())
            fault = (await stream.next()).fault
            assert (fault.epoch, fault.step_id) == (stream.epoch, 2)
            assert "asked to fail" in fault.message
            with pytest.raises(EOFError):
                await stream.next()
            epoch = stream.epoch
        async with StepStream(address) as again:
            assert (await again.open(epoch=epoch, last_committed_step_id=1)).epoch > epoch
            assert await again.run(1, begin()) == EXPECTED[:1]

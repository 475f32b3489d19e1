"""Processes are killed, stopped and replaced; streams go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.v1 import generate_pb2
from integration_tests.engine_client import EngineClient, num_held_slots
from integration_tests.harness import Process, Processes, fake_model_dir, running
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import SamplingParams, reference_output

VOCAB_SIZE: Final = 400
NUM_STREAMS: Final = 32
NUM_KILLS: Final = 10
MAX_ROWS: Final = 24
TIMEOUT_S: Final = 90.0
State = pb.WatchExecutorResponse

EXECUTOR_FLAGS: Final = (
    *("--num-device-blocks", 200, "--block-size", 8, "--max-rows", MAX_ROWS),
    *("--vocab-size", VOCAB_SIZE, "--step-ms", 10),
)
# Strict: a plan that the executor refuses ends the engine, and with it the test.
ENGINE_FLAGS: Final = ("--strict", "--heartbeat-timeout-s", 1.5)


class System:
    """Executor, engine and front end as processes, with clients of both sides."""

    def __init__(
        self, processes: Processes, frontend: Process, public: PublicClient, engine: EngineClient
    ) -> None:
        self.processes, self.frontend = processes, frontend
        self.public, self.engine = public, engine


@contextlib.asynccontextmanager
async def system(directory: Path) -> AsyncIterator[System]:
    """Everything up and serving."""
    processes = Processes(directory, executor_flags=EXECUTOR_FLAGS, engine_flags=ENGINE_FLAGS)
    model = fake_model_dir(directory / "model", VOCAB_SIZE)
    frontend, address = processes.add_frontend(model)
    async with (
        asyncio.timeout(TIMEOUT_S),
        running(processes),
        PublicClient(address) as public,
        EngineClient(processes.engine_address) as engine,
    ):
        await frontend.start()
        await public.serving()
        await engine.ready()
        yield System(processes, frontend, public, engine)


def requests() -> list[tuple[list[int], int, dict[str, Any]]]:
    """Prompts, output lengths and sampling of the streams; half of them sample."""
    rng = random.Random(1)
    drawn = []
    for number in range(NUM_STREAMS):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
        sampling = {"temperature": 0.7, "seed": number} if number % 2 else {}
        drawn.append((prompt, rng.randint(100, 160), sampling))
    return drawn


def reference(prompt: Sequence[int], num_tokens: int, sampling: dict[str, Any]) -> list[int]:
    """What a stream must bring; the API's default top_p is 1."""
    params = SamplingParams(top_p=1.0, **sampling) if sampling else None
    return reference_output(prompt, num_tokens, VOCAB_SIZE, params)


async def stream_all(public: PublicClient) -> list[Answer]:
    """All streams at once, to their ends."""
    return await asyncio.gather(*(public.generate(p, n, **s) for p, n, s in requests()))


async def replaced(system: System, epoch: int) -> int:
    """Wait until the engine has an executor of another epoch; returns that."""
    request = pb.WatchExecutorRequest()
    async for update in system.engine.stub.WatchExecutor(request, wait_for_ready=True):
        if update.state == State.STATE_READY and update.epoch != epoch:
            return int(update.epoch)
    raise AssertionError("the watch ended")


@pytest.mark.timeout(100)
async def test_streams_survive_ten_kills_of_the_executor(tmp_path: Path) -> None:
    rng = random.Random(7)
    async with system(tmp_path) as up:
        undisturbed = await stream_all(up.public)
        epoch = await replaced(up, 0)
        streams = asyncio.create_task(stream_all(up.public))
        for _ in range(NUM_KILLS):
            await asyncio.sleep(rng.uniform(0.05, 0.25))
            assert not streams.done(), "no stream is left to disturb"
            await up.processes.executor.restart()
            epoch = await replaced(up, epoch)
        answers = await streams
        for answer, calm, request in zip(answers, undisturbed, requests(), strict=True):
            assert answer.code is grpc.StatusCode.OK, answer.details
            assert answer.token_ids == reference(*request)
            assert (answer.text.encode(), answer.token_ids) == (calm.text.encode(), calm.token_ids)
            assert answer.finish_reason == generate_pb2.FINISH_REASON_LENGTH
        shot = await up.engine.idle()
        assert shot.counters.num_recoveries == NUM_KILLS
        assert up.processes.engine.num_starts == 1


@pytest.mark.timeout(100)
async def test_a_stopped_executor_is_noticed_and_replaced(tmp_path: Path) -> None:
    async with system(tmp_path) as up:
        streams = asyncio.create_task(stream_all(up.public))
        epoch = await replaced(up, 0)
        await asyncio.sleep(0.3)
        up.processes.executor.pause()
        await up.engine.watch_until(State.STATE_UNRESPONSIVE, "silent")
        await up.processes.executor.restart()
        await replaced(up, epoch)
        for answer, request in zip(await streams, requests(), strict=True):
            assert answer.code is grpc.StatusCode.OK, answer.details
            assert answer.token_ids == reference(*request)


@pytest.mark.timeout(100)
async def test_an_executor_that_was_only_slow_goes_on_in_its_epoch(tmp_path: Path) -> None:
    async with system(tmp_path) as up:
        streams = asyncio.create_task(stream_all(up.public))
        await up.engine.snapshot_when(lambda shot: shot.num_running >= MAX_ROWS // 2)
        up.processes.executor.pause()
        await up.engine.watch_until(State.STATE_UNRESPONSIVE)
        up.processes.executor.resume()
        for answer, request in zip(await streams, requests(), strict=True):
            assert answer.token_ids == reference(*request)
        assert (await up.engine.idle()).counters.num_recoveries == 0


@pytest.mark.timeout(100)
async def test_a_killed_front_end_leaves_nothing_behind(tmp_path: Path) -> None:
    async with system(tmp_path) as up:
        streams = asyncio.create_task(stream_all(up.public))
        await up.engine.snapshot_when(lambda shot: shot.num_running >= MAX_ROWS // 2)
        survivor = up.engine.submit([5, 6, 7], 60)
        await up.frontend.kill()
        answers = await streams
        assert {answer.code for answer in answers} == {grpc.StatusCode.UNAVAILABLE}
        shot = await up.engine.snapshot_when(lambda s: s.num_running + s.num_waiting <= 1)
        assert num_held_slots(shot) <= 64  # the survivor's alone
        await survivor.finished()
        assert survivor.token_ids == reference([5, 6, 7], 60, {})
        await up.engine.idle()
        # Every row is begun again: a strict engine would die if one were still live.
        outputs = [up.engine.submit([row], 10) for row in range(MAX_ROWS)]
        for row, output in enumerate(outputs):
            await output.finished()
            assert output.token_ids == reference([row], 10, {})
        await up.frontend.start()
        await up.public.serving()
        assert (await up.public.generate([1, 2], 5)).token_ids == reference([1, 2], 5, {})


@pytest.mark.timeout(100)
async def test_a_killed_engine_ends_streams_and_a_new_one_starts_clean(tmp_path: Path) -> None:
    async with system(tmp_path) as up:
        streams = asyncio.create_task(stream_all(up.public))
        await up.engine.snapshot_when(lambda shot: shot.num_running >= MAX_ROWS // 2)
        epoch = await replaced(up, 0)
        await up.processes.engine.kill()
        num_lost = 0
        for answer in await streams:
            assert answer.code is grpc.StatusCode.UNAVAILABLE
            # A request that the front end had not handed on yet finds no engine at all.
            lost = "engine was lost" in answer.details
            assert lost or ("not ready" in answer.details and not answer.token_ids)
            num_lost += lost
        assert num_lost >= MAX_ROWS // 2
        await up.processes.engine.start()
        await up.public.serving()
        answers = await stream_all(up.public)
        assert [a.token_ids for a in answers] == [reference(*r) for r in requests()]
        async with EngineClient(up.processes.engine_address) as engine:
            shot = await engine.idle()
        assert shot.epoch > epoch
        assert shot.counters.num_recoveries == 0
        assert up.processes.executor.num_starts == 1


@pytest.mark.timeout(100)
async def test_an_engine_waits_for_its_executor(tmp_path: Path) -> None:
    processes = Processes(tmp_path, executor_flags=EXECUTOR_FLAGS, engine_flags=ENGINE_FLAGS)
    frontend, address = processes.add_frontend(fake_model_dir(tmp_path / "model", VOCAB_SIZE))
    try:
        await processes.engine.start()
        await frontend.start()
        async with (
            PublicClient(address) as public,
            EngineClient(processes.engine_address) as engine,
        ):
            await engine.watch_until(State.STATE_CONNECTING, "UNAVAILABLE: nobody listens at unix:")
            early = await public.generate([1], 1)
            assert early.code is grpc.StatusCode.UNAVAILABLE
            await processes.executor.start()
            await engine.ready()
            await public.serving()
            assert (await public.generate([1, 2], 5)).token_ids == reference([1, 2], 5, {})
        assert "state=connecting" in processes.engine.log()
    finally:
        await processes.stop()


@pytest.mark.timeout(60)
async def test_an_executor_frozen_before_the_engine_came_is_noticed(tmp_path: Path) -> None:
    processes = Processes(tmp_path, executor_flags=EXECUTOR_FLAGS, engine_flags=ENGINE_FLAGS)
    async with asyncio.timeout(TIMEOUT_S), running(processes):
        async with EngineClient(processes.engine_address) as engine:
            await engine.ready()
        await processes.engine.kill()
        processes.executor.pause()
        await processes.engine.start()
        async with EngineClient(processes.engine_address) as engine:
            await engine.watch_until(State.STATE_UNRESPONSIVE, "DEADLINE_EXCEEDED")
            await processes.executor.restart()
            await engine.ready()


@pytest.mark.timeout(60)
async def test_an_engine_that_was_paused_itself_does_not_blame_the_executor(tmp_path: Path) -> None:
    async with system(tmp_path) as up:
        states: set[int] = set()

        async def watch() -> None:
            async for update in up.engine.stub.WatchExecutor(pb.WatchExecutorRequest()):
                states.add(update.state)

        watching = asyncio.create_task(watch())
        streams = asyncio.create_task(stream_all(up.public))
        await asyncio.sleep(0.3)
        up.processes.engine.pause()
        await asyncio.sleep(3.0)  # twice the heartbeat timeout
        up.processes.engine.resume()
        for answer, request in zip(await streams, requests(), strict=True):
            assert answer.token_ids == reference(*request)
        watching.cancel()
        assert states == {State.STATE_READY}

"""Many streams at once through a real front end: nothing lost, nothing reordered, ends noticed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import grpc
import pytest

from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from integration_tests.engine_client import EngineClient, num_held_slots
from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import reference_output

VOCAB_SIZE: Final = 400
STEP_S: Final = 0.030
NOTICE_S: Final = 0.050
"""How long after a client's end its blocks may still be held, beside the step under way."""

TIMEOUT_S: Final = 60.0
NUM_STREAMS: Final = 256
NUM_TOKENS: Final = 100
MAX_WAITING: Final = 2000


@contextlib.asynccontextmanager
async def served(
    directory: Path, step_s: float, *engine_flags: object
) -> AsyncIterator[tuple[PublicClient, EngineClient]]:
    """Processes with room for every stream, and clients of both sides."""
    processes = Processes(
        directory,
        executor_flags=(
            *("--num-device-blocks", 4096, "--block-size", 8, "--max-rows", NUM_STREAMS),
            *("--vocab-size", VOCAB_SIZE, "--max-model-len", 4096, "--step-ms", step_s * 1e3),
        ),
        engine_flags=("--strict", "--max-num-seqs", NUM_STREAMS, *engine_flags),
    )
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
        yield public, engine


def prompt(number: int) -> list[int]:
    """One to twenty token ids."""
    rng = random.Random(number)
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]


@pytest.mark.timeout(70)
async def test_256_streams_lose_and_reorder_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, STEP_S) as (public, engine):
        numbers = range(NUM_STREAMS)
        begin = time.monotonic()
        streams = (public.generate(prompt(number), NUM_TOKENS) for number in numbers)
        answers = await asyncio.gather(*streams)
        elapsed_s = time.monotonic() - begin
        for number, answer in zip(numbers, answers, strict=True):
            assert answer.code is grpc.StatusCode.OK, answer.details
            assert answer.token_ids == reference_output(prompt(number), NUM_TOKENS, VOCAB_SIZE)
            assert answer.usage is not None
            assert answer.usage.output_tokens == NUM_TOKENS
            assert answer.finish_reason == pb.FINISH_REASON_LENGTH
        shot = await engine.idle()
        assert shot.counters.num_finished == NUM_STREAMS
        # They ran together: one after another they would take 256 times as long.
        assert elapsed_s < 5 * NUM_TOKENS * STEP_S


async def time_until_free(
    public: PublicClient,
    engine: EngineClient,
    end: Callable[[asyncio.Task[None]], Awaitable[None]],
    timeout_s: float | None = None,
) -> tuple[float, Answer]:
    """Run one long stream, end it from the client's side; returns how long its blocks stay [s]."""
    answer = Answer()
    call = public.start(prompt(1), 3000, timeout_s)
    stream = asyncio.create_task(public.follow(call, answer))
    await engine.snapshot_when(lambda shot: num_held_slots(shot) > 0)
    await end(stream)
    begin = time.monotonic()
    await engine.snapshot_when(lambda shot: num_held_slots(shot) == 0)
    return time.monotonic() - begin, answer


async def cancel(stream: asyncio.Task[None]) -> None:
    """The client goes away."""
    await asyncio.sleep(0.2)
    stream.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stream


@pytest.mark.timeout(70)
async def test_a_cancelled_stream_frees_its_blocks_at_once(tmp_path: Path) -> None:
    async with served(tmp_path, STEP_S) as (public, engine):
        times_s = []
        for _ in range(7):
            elapsed_s, answer = await time_until_free(public, engine, cancel)
            assert answer.token_ids == reference_output(
                prompt(1), len(answer.token_ids), VOCAB_SIZE
            )
            times_s.append(elapsed_s)
        assert statistics.median(times_s) <= STEP_S + NOTICE_S, times_s
        assert (await engine.idle()).num_running == 0


@pytest.mark.timeout(70)
async def test_a_deadline_frees_its_blocks_at_once(tmp_path: Path) -> None:
    async def expire(stream: asyncio.Task[None]) -> None:
        await stream

    async with served(tmp_path, STEP_S) as (public, engine):
        times_s = []
        for _ in range(7):
            elapsed_s, answer = await time_until_free(public, engine, expire, timeout_s=0.4)
            assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert answer.token_ids
            times_s.append(elapsed_s)
        assert statistics.median(times_s) <= STEP_S + NOTICE_S, times_s


@pytest.mark.timeout(70)
async def test_ten_thousand_at_once_fill_the_queue_and_hurt_nobody(tmp_path: Path) -> None:
    async with served(tmp_path, 0.001, "--max-waiting", MAX_WAITING) as (public, engine):
        early = asyncio.create_task(public.generate(prompt(1), 1000))
        await engine.snapshot_when(lambda shot: shot.num_running == 1)
        outputs = engine.submit_many([([number % VOCAB_SIZE, 7], 3) for number in range(10_000)])
        aborted = outputs[:MAX_WAITING:4]
        for output in aborted:
            engine.stop(output)
        for output in set(outputs) - set(aborted):
            await output.ended.wait()
        rejected = [output for output in outputs if output.rejection is not None]
        rejections = [output.rejection for output in rejected if output.rejection is not None]
        assert {rejection.reason for rejection in rejections} == {"QUEUE_FULL"}
        assert all(rejection.retry_delay_ns for rejection in rejections)
        assert len(rejected) == 10_000 - MAX_WAITING
        assert all(output.rejection is None for output in outputs[:MAX_WAITING])  # the first ones
        finished = [output for output in outputs if output.finish is not None]
        assert len(finished) >= MAX_WAITING - len(aborted)
        for number, output in enumerate(outputs):
            if output.finish is not None:
                assert output.finish.reason == engine_pb.FINISH_REASON_LENGTH
                wanted = reference_output([number % VOCAB_SIZE, 7], 3, VOCAB_SIZE)
                assert output.token_ids == wanted
        answer = await early
        assert answer.token_ids == reference_output(prompt(1), 1000, VOCAB_SIZE)
        late = await public.generate(prompt(2), 5)
        assert late.token_ids == reference_output(prompt(2), 5, VOCAB_SIZE)
        await engine.idle()


@pytest.mark.timeout(70)
async def test_a_burst_of_calls_gets_an_answer_each(tmp_path: Path) -> None:
    """Over the public port: gRPC's own limits must not drop calls before they are seen."""
    num_calls = 5000
    async with served(tmp_path, 0.001, "--max-waiting", MAX_WAITING) as (public, engine):
        answers = await asyncio.gather(*(public.generate([n % 7], 1) for n in range(num_calls)))
        codes = Counter(answer.code for answer in answers)
        assert codes.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes[grpc.StatusCode.OK] >= MAX_WAITING
        assert all(a.details for a in answers if a.code is grpc.StatusCode.RESOURCE_EXHAUSTED)
        await engine.idle()

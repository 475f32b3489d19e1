"""Engine, executor and one front end's stream in one loop, and requests to give them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from blockyard.engine.v1 import engine_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, fake_info
from executor_svc.plan import Plan
from executor_svc.runner import RunnerInfo
from integration_tests.engine_client import EngineClient, Output
from integration_tests.harness import RecordingRunner, engine_in_process, executor_in_process
from integration_tests.reference import SamplingParams, reference_output
from scheduler_svc.engine.loop import Engine

INFO: Final = fake_info(33, block_size=4, max_rows=8, max_model_len=64, max_num_batched_tokens=24)

TIMEOUT_S: Final = 30.0
"""A test that takes longer fails, and still leaves nothing behind."""


class Stack:
    """Engine, executor and one front end's stream, in one loop over unix sockets."""

    def __init__(self, engine: Engine, runner: RecordingRunner, client: EngineClient) -> None:
        self.engine, self.runner, self.client = engine, runner, client

    def plans_with_rows(self) -> list[Plan]:
        """Plans that ran something."""
        return [plan for plan in self.runner.plans if plan.same_batch or plan.batch_rows.size]

    async def plans(self, count: int) -> list[Plan]:
        """Wait until so many plans reached the executor."""
        while len(self.runner.plans) < count:  # noqa: ASYNC110 - another thread appends
            await asyncio.sleep(0.002)
        return self.runner.plans

    async def settled(self) -> None:
        """Wait until the result of every plan is committed, of those without rows too."""
        scheduler = self.engine.scheduler
        while scheduler is not None and scheduler.in_flight:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def stack(
    directory: Path,
    options: FakeOptions | None = None,
    *,
    runner_type: type[RecordingRunner] = RecordingRunner,
    info: RunnerInfo = INFO,
    executor: str = "",
    **settings: Any,
) -> AsyncIterator[Stack]:
    """Everything up; `executor` is where the engine looks for it, if not where it is."""
    runner = runner_type(info, options)
    listen = f"unix:{directory}/executor.sock"
    address = f"unix:{directory}/engine.sock"
    async with (
        asyncio.timeout(TIMEOUT_S),
        executor_in_process(runner, listen),
        engine_in_process(address, executor or listen, **settings) as engine,
        EngineClient(address) as client,
    ):
        await client.ready()
        yield Stack(engine, runner, client)


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(INFO.vocab_size) for _ in range(num_tokens)]


def expected(prompt_ids: Sequence[int], num_tokens: int, **sampling: Any) -> list[int]:
    """The reference's answer."""
    params = SamplingParams(**sampling)
    return reference_output(prompt_ids, num_tokens, INFO.vocab_size, params)


async def submit_many(client: EngineClient, count: int) -> list[tuple[Output, list[int]]]:
    """Greedy and sampling requests of all lengths, with what must come of them."""
    requests = []
    for number in range(count):
        rng = random.Random(number)
        ids, num_tokens = prompt(number, rng.randint(1, 30)), rng.randint(1, 30)
        sampling = {"temperature": 0.5, "top_p": 1.0, "seed": number} if number % 2 else {}
        output = client.submit(ids, num_tokens, **sampling)
        requests.append((output, expected(ids, num_tokens, **sampling)))
    return requests


async def check_all(requests: list[tuple[Output, list[int]]]) -> None:
    """Wait for all; each must have come to its end with the reference's tokens."""
    for output, wanted in requests:
        finish = await output.finished()
        assert output.token_ids == wanted
        assert (finish.reason, finish.num_output_tokens) == (pb.FINISH_REASON_LENGTH, len(wanted))

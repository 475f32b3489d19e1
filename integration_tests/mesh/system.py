"""Ours behind a proxy: an engine on the content-checking executor, front ends on TCP ports."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from integration_tests.harness import Process, Processes, fake_model_dir, running
from integration_tests.mesh.peer import free_port
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import reference_output

VOCAB_SIZE: Final = 400
STEP_S: Final = 0.04
MAX_STREAMS: Final = 256


@dataclass(frozen=True, slots=True)
class System:
    """What runs."""

    processes: Processes
    frontends: tuple[Process, ...]
    ports: tuple[int, ...]  # of the front ends
    model: Path

    def address(self, index: int) -> str:
        """Of a front end."""
        return f"127.0.0.1:{self.ports[index]}"

    async def serving(self, index: int) -> None:
        """Wait until a front end takes requests."""
        async with PublicClient(self.address(index)) as client:
            await client.serving()


@contextlib.asynccontextmanager
async def running_system(
    directory: Path,
    num_frontends: int,
    *frontend_flags: object,
    engine_flags: Sequence[object] = (),
) -> AsyncIterator[System]:
    """Start all of it; kill it at the end."""
    processes = Processes(
        directory,
        executor_flags=(
            *("--num-device-blocks", 4096, "--block-size", 8, "--max-rows", MAX_STREAMS),
            *("--vocab-size", VOCAB_SIZE, "--max-model-len", 4096, "--step-ms", STEP_S * 1e3),
        ),
        engine_flags=("--strict", *engine_flags),
    )
    model = fake_model_dir(directory / "model", VOCAB_SIZE)
    ports = tuple(free_port() for _ in range(num_frontends))
    frontends = tuple(
        processes.add_frontend(model, *frontend_flags, listen=f"127.0.0.1:{port}")[0]
        for port in ports
    )
    async with running(processes):
        system = System(processes, frontends, ports, model)
        await asyncio.gather(*(frontend.start() for frontend in frontends))
        await asyncio.gather(*(system.serving(index) for index in range(num_frontends)))
        yield system


def prompt(number: int) -> list[int]:
    """One to twenty token ids."""
    rng = random.Random(number)
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]


def check(answer: Answer, number: int, num_tokens: int) -> None:
    """Assert that this is all of the answer to `prompt(number)`."""
    assert answer.code is grpc.StatusCode.OK, answer.details
    assert answer.token_ids == reference_output(prompt(number), num_tokens, VOCAB_SIZE)

"""Real processes that send traces, small enough that a few requests meet every kind of trouble."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.public_client import PublicClient

VOCAB_SIZE: Final = 400
MAX_MODEL_LEN: Final = 1000
STEP_S: Final = 0.010
TIMEOUT_S: Final = 60.0
NAN_SEED: Final = 7
"""Of requests that fail alone."""
FATAL_SEED: Final = 8
"""Of requests that end every executor they reach."""
MAX_WAITING: Final = 4
PROMPT: Final = list(range(1, 151))
"""Three chunks."""
CHUNKS: Final = (64, 64, 22)

_BUDGET_TOKENS: Final = 64


@contextlib.asynccontextmanager
async def traced_system(
    directory: Path, endpoint: str, *flags: object
) -> AsyncIterator[tuple[PublicClient, Processes, str]]:
    """Processes that send traces to `endpoint`, a client, and the front end's address."""
    tracing = ("--otlp-endpoint", endpoint, *flags)
    processes = Processes(
        directory,
        executor_flags=(
            *("--num-device-blocks", 64, "--num-host-blocks", 64, "--block-size", 8),
            *("--vocab-size", VOCAB_SIZE, "--max-model-len", MAX_MODEL_LEN),
            *("--step-ms", STEP_S * 1e3, "--max-num-batched-tokens", _BUDGET_TOKENS),
            *("--nan-seeds", NAN_SEED, "--fatal-seeds", FATAL_SEED),
        ),
        engine_flags=("--strict", "--preemption", "swap", "--max-waiting", MAX_WAITING, *tracing),
    )
    model = fake_model_dir(directory / "model", VOCAB_SIZE)
    frontend, address = processes.add_frontend(model, "--lame-duck-s", 0, *tracing)
    async with running(processes), PublicClient(address) as client:
        await frontend.start()
        await asyncio.wait_for(client.serving(), TIMEOUT_S)
        yield client, processes, address
        assert await frontend.stop() == 0
        assert await processes.engine.stop() == 0

"""A front end, its scripted engine and a client, all in one loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from tokenizers import Tokenizer

from blockyard.common import model_dir
from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2_grpc
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.lifecycle import Frontend
from scheduler_svc.frontend.tests.calls import until
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, unix_address
from scheduler_svc.frontend.tests.models import write_model_dir

MAX_MODEL_LEN = 100
MAX_BRANCHES = 8


@dataclass
class Service:
    """What a test talks to."""

    frontend: Frontend
    engine: FakeEngine
    channel: grpc.aio.Channel
    stub: generate_pb2_grpc.GenerateServiceAsyncStub
    tokenizer: Tokenizer


def engine_state(**changes: object) -> engine_pb2.EngineState:
    fields = {"ready": True, "model_name": "tiny", "model_digest": "d1", "device": "a device"}
    state = engine_pb2.EngineState(
        max_model_len=MAX_MODEL_LEN, vocab_size=400, block_size=16, max_branches=MAX_BRANCHES
    )
    for name, value in (fields | changes).items():
        setattr(state, name, value)
    return state


def frontend_settings(directory: Path, **changes: object) -> FrontendSettings:
    fields: dict[str, object] = {
        "engine": unix_address(directory),
        "listen": "127.0.0.1:0",
        "model_dir": directory / "model",
        "max_buffered_tokens": 256,
        "lame_duck_s": 0.0,
        "drain_grace_s": 5.0,
    }
    return FrontendSettings.model_validate(fields | changes)


@contextlib.asynccontextmanager
async def serving(
    directory: Path, **settings: object
) -> AsyncIterator[tuple[Frontend, FakeEngine]]:
    """A ready front end with an engine that waits to be told what to send."""
    model = model_dir.load(write_model_dir(directory / "model"))
    async with contextlib.AsyncExitStack() as stack:
        engine = FakeEngine(unix_address(directory), engine_state())
        await engine.start()
        stack.push_async_callback(engine.kill)
        frontend = Frontend(frontend_settings(directory, **settings), model)
        await frontend.start()
        stack.push_async_callback(frontend.close)
        await until(lambda: frontend.is_ready)
        yield frontend, engine


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """The same, and a client."""
    async with serving(tmp_path) as (frontend, engine):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{frontend.port}")
        stub: generate_pb2_grpc.GenerateServiceAsyncStub
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
        yield Service(frontend, engine, channel, stub, tokenizer)
        await channel.close()

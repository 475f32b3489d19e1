"""Clients that do not read, over real connections with small windows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from blockyard.client.errors import from_rpc
from blockyard.common import model_dir
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc
from scheduler_svc.frontend.fanout import Stop
from scheduler_svc.frontend.lifecycle import Frontend
from scheduler_svc.frontend.tests.calls import messages_of, until
from scheduler_svc.frontend.tests.conftest import (
    Service,
    engine_state,
    frontend_settings,
)
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, finished, unix_address
from scheduler_svc.frontend.tests.models import write_model_dir

SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
REQUEST = pb.GenerateRequest(
    prompt="The quick", skip_text=True, logprobs=pb.Logprobs(num_candidates=20)
)
TIMEOUT_S = 0.5


@pytest.fixture
async def other(service: Service) -> AsyncIterator[generate_pb2_grpc.GenerateServiceAsyncStub]:
    """A client with a small window, on a connection of its own."""
    address = f"127.0.0.1:{service.frontend.port}"
    async with grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
        yield generate_pb2_grpc.GenerateServiceStub(channel)


def blocked(frontend: Frontend) -> bool:
    streams = frontend._fanout._streams.values()
    return any(stream.writing_since_s is not None for stream in streams)


async def flood(engine: FakeEngine, key: int, frontend: Frontend) -> None:
    """Send tokens, a message each, until the transport takes no more."""
    async with asyncio.timeout(20):
        while not blocked(frontend):
            await engine.send_tokens(key, [50])
            await asyncio.sleep(0.001)


async def status_of(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await messages_of(call)
    assert "too slowly" in str(caught.value.details())
    assert from_rpc(caught.value).reason == "SLOW_READER"
    return caught.value.code().name


async def test_a_full_backlog_ends_a_handler_that_waits_for_the_transport(
    service: Service, other: generate_pb2_grpc.GenerateServiceAsyncStub
) -> None:
    call = other.Generate(REQUEST)
    engine = service.engine
    submit, _ = await engine.next_submit()
    await flood(engine, submit.request_id, service.frontend)
    reading = service.stub.Generate(REQUEST)
    second, _ = await engine.next_submit()
    begin_s = time.monotonic()
    await engine.send_tokens(submit.request_id, [50] * 300)  # more than may wait
    assert await engine.next_stop() == Stop(submit.request_id)
    await engine.send_tokens(second.request_id, [51], finished("LENGTH"))
    assert len(await messages_of(reading)) == 1
    await until(lambda: service.frontend._fanout.num_open == 0)
    assert time.monotonic() - begin_s < 8
    assert await status_of(call) == "RESOURCE_EXHAUSTED"


async def test_a_client_that_takes_nothing_is_ended_after_a_time(tmp_path: Path) -> None:
    model = model_dir.load(write_model_dir(tmp_path / "model"))
    engine = FakeEngine(unix_address(tmp_path), engine_state())
    await engine.start()
    frontend = Frontend(
        frontend_settings(tmp_path, max_buffered_tokens=10**6, slow_reader_timeout_s=TIMEOUT_S),
        model,
    )
    await frontend.start()
    await until(lambda: frontend.is_ready)
    address = f"127.0.0.1:{frontend.port}"
    async with grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
        stub: generate_pb2_grpc.GenerateServiceAsyncStub
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        call = stub.Generate(REQUEST)
        submit, _ = await engine.next_submit()
        await flood(engine, submit.request_id, frontend)
        begin_s = time.monotonic()
        assert await engine.next_stop() == Stop(submit.request_id)
        await until(lambda: frontend._fanout.num_open == 0)
        assert TIMEOUT_S / 2 < time.monotonic() - begin_s < 8
        assert await status_of(call) == "RESOURCE_EXHAUSTED"
    await frontend.close()
    await engine.kill()

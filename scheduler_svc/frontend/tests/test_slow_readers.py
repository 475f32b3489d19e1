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
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc
from scheduler_svc.frontend.fanout import Stop
from scheduler_svc.frontend.lifecycle import Frontend
from scheduler_svc.frontend.tests.calls import messages_of, until
from scheduler_svc.frontend.tests.conftest import (
    Service,
    serving,
)
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, finished

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


async def flood(engine: FakeEngine, key: int, frontend: Frontend) -> None:
    """Send tokens, a message each, until the transport takes no more."""
    async with asyncio.timeout(20):
        while not await is_blocked(frontend):
            await engine.send_tokens(key, [50])


async def is_blocked(frontend: Frontend) -> bool:
    """Whether a write does not end: on a busy machine any write takes a while."""
    (stream,) = frontend._fanout._streams.values()
    begin_s = stream.writing_since_s
    for _ in range(30):
        await asyncio.sleep(0.001)
        if begin_s is None or stream.writing_since_s != begin_s:
            return False
    return True


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
    async with (
        serving(tmp_path, max_buffered_tokens=10**6, slow_reader_timeout_s=TIMEOUT_S) as parts,
        asyncio.timeout(30),
    ):
        frontend, engine = parts
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
            assert TIMEOUT_S / 4 < time.monotonic() - begin_s < 8
            assert await status_of(call) == "RESOURCE_EXHAUSTED"

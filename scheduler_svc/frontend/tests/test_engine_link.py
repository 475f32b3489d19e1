"""Losing, refusing and finding the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockyard.common import model_dir
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.fanout import Stop
from scheduler_svc.frontend.lifecycle import Frontend
from scheduler_svc.frontend.tests.calls import expect_status, messages_of, until
from scheduler_svc.frontend.tests.conftest import Service, engine_state, frontend_settings
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, finished, unix_address
from scheduler_svc.frontend.tests.models import write_model_dir

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, name: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response: health_pb2.HealthCheckResponse
    response = await stub.Check(health_pb2.HealthCheckRequest(service=name))
    return response.status


@pytest.fixture
async def lonely(tmp_path: Path) -> AsyncIterator[Frontend]:
    """A front end whose engine has not come yet."""
    model = model_dir.load(write_model_dir(tmp_path / "model"))
    frontend = Frontend(frontend_settings(tmp_path), model)
    await frontend.start()
    yield frontend
    await frontend.close()


async def test_hello_says_who_and_what(service: Service) -> None:
    (hello,) = service.engine.hellos
    assert hello.protocol_version == ENGINE_PROTOCOL_VERSION
    assert hello.model_digest == "d1"
    assert hello.frontend_id


async def test_health_names(service: Service) -> None:
    for name in ("", "blockyard.v1.GenerateService", "liveness", "progress"):
        assert await health(service.channel, name) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(service.channel, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_progress_is_apart_from_readiness(service: Service) -> None:
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="progress"))
    assert (await watch.read()).status == SERVING
    service.engine.send_state(engine_state(stalled=True))
    assert (await watch.read()).status == NOT_SERVING
    assert await health(service.channel) == SERVING
    service.engine.send_state(engine_state())
    assert (await watch.read()).status == SERVING
    service.engine.send_state(engine_state(ready=False))
    assert (await watch.read()).status == NOT_SERVING
    assert await health(service.channel) == NOT_SERVING
    watch.cancel()


async def test_every_watcher_sees_every_change(service: Service) -> None:
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    watches.pop(0).cancel()
    service.engine.send_state(engine_state(ready=False))
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


async def test_engine_loss_ends_streams_and_a_new_one_serves(service: Service) -> None:
    calls = [service.stub.Generate(pb.GenerateRequest(prompt="a")) for _ in range(3)]
    keys = [(await service.engine.next_submit())[0].request_id for _ in calls]
    await service.engine.send_tokens(keys[0], [50])
    await service.engine.kill()
    for call in calls:
        await expect_status(messages_of(call), grpc.StatusCode.UNAVAILABLE, "engine was lost")
    await until(lambda: not service.frontend.is_ready)
    assert await health(service.channel) == NOT_SERVING
    assert await health(service.channel, "liveness") == SERVING
    await service.engine.start()
    await until(lambda: service.frontend.is_ready)
    assert await health(service.channel) == SERVING
    unary = service.stub.GenerateUnary(pb.GenerateRequest(prompt="a"))
    submit, _ = await service.engine.next_submit()
    assert submit.request_id not in keys
    await service.engine.send_tokens(submit.request_id, [50], finished("LENGTH"))
    assert (await unary).usage.output_tokens == 1
    assert service.engine.stops.empty()


async def test_a_stream_that_ends_cleanly_is_a_loss_too(service: Service) -> None:
    call = service.stub.Generate(pb.GenerateRequest(prompt="a"))
    await service.engine.next_submit()
    service.engine.end_streams()
    await expect_status(messages_of(call), grpc.StatusCode.UNAVAILABLE, "engine was lost")
    await until(lambda: len(service.engine.hellos) == 2 and service.frontend.is_ready)


async def test_waits_for_an_engine_that_comes_late(lonely: Frontend, tmp_path: Path) -> None:
    address = f"127.0.0.1:{lonely.port}"
    async with grpc.aio.insecure_channel(address) as channel:
        assert await health(channel) == NOT_SERVING
        engine = FakeEngine(unix_address(tmp_path), engine_state(ready=False))
        await engine.start()
        await until(lambda: bool(engine.hellos))
        assert await health(channel) == NOT_SERVING
        engine.send_state(engine_state())
        await until(lambda: lonely.is_ready)
        assert await health(channel) == SERVING
        await engine.kill()


@pytest.mark.parametrize("how", ["digest", "refusal"])
async def test_wrong_engine_is_reported_once_and_retried(
    lonely: Frontend, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = engine_state(model_digest="d2") if how == "digest" else engine_state()
    engine = FakeEngine(unix_address(tmp_path), wrong)
    if how == "refusal":
        engine.refusal = "protocol version 1, this engine has 2"
    await engine.start()
    await until(lambda: len(engine.hellos) >= 2)
    assert not lonely.is_ready
    expected = "digest d2" if how == "digest" else "FAILED_PRECONDITION: protocol version 1"
    assert sum(expected in r.getMessage() for r in caplog.records) == 1
    engine.refusal = None
    engine.state = engine_state()
    await until(lambda: lonely.is_ready)
    await engine.kill()


async def test_submits_of_one_tick_share_a_frame(service: Service) -> None:
    """Many requests at once all arrive, in order of their keys."""
    calls = [service.stub.Generate(pb.GenerateRequest(prompt="a")) for _ in range(50)]
    keys = [(await service.engine.next_submit())[0].request_id for _ in calls]
    assert keys == sorted(keys)
    assert len(set(keys)) == 50
    for call in calls:
        call.cancel()
    stops = {await service.engine.next_stop() for _ in calls}
    assert stops == {Stop(key) for key in keys}
    await asyncio.sleep(0)

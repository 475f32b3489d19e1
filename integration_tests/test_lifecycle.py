"""Health by name, peers that vanish, and how the services end together."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockyard.common import model_dir
from integration_tests.engine_client import EngineClient, num_held_slots
from integration_tests.harness import FAKE_DIGEST, Processes, fake_model_dir, running, until
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import reference_output
from integration_tests.stack import INFO, Stack, stack
from integration_tests.uds_proxy import UdsProxy
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.lifecycle import Frontend

pytestmark = pytest.mark.timeout(60)

PERIOD_S: Final = 1.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
VOCAB_SIZE: Final = 400
EXECUTOR_FLAGS: Final = ("--vocab-size", VOCAB_SIZE, "--max-model-len", 4096)


@contextlib.asynccontextmanager
async def health_of(address: str) -> AsyncIterator[Any]:
    """A stub of grpc.health.v1."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def status(health: Any, name: str) -> int:
    response = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
    return int(response.status)


async def until_status(health: Any, name: str, wanted: int, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while await status(health, name) != wanted:  # noqa: ASYNC110 - no event reaches us
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def frontend_of(up: Stack, directory: Path) -> AsyncIterator[str]:
    """A front end in this loop; yields its address."""
    model = model_dir.load(fake_model_dir(directory / "model", INFO.vocab_size))
    assert model.digest == FAKE_DIGEST
    fields = {
        "engine": f"unix:{directory}/engine.sock",
        "listen": f"unix:{directory}/frontend.sock",
        "model_dir": model.path,
    }
    settings = FrontendSettings.model_validate(fields)
    frontend = Frontend(settings, model)
    await frontend.start()
    try:
        yield settings.listen
    finally:
        await frontend.close()


async def test_an_executor_that_lives_but_stands_still_is_no_progress(tmp_path: Path) -> None:
    async with (
        stack(tmp_path, progress_timeout_s=PERIOD_S) as up,
        frontend_of(up, tmp_path) as address,
        health_of(address) as health,
    ):
        await until_status(health, "progress", SERVING)
        up.runner.gate.clear()  # the device hangs; heartbeats go on
        output = up.client.submit([1, 2, 3], 1)
        begin = time.monotonic()
        await until_status(health, "progress", NOT_SERVING)
        elapsed_s = time.monotonic() - begin
        assert 0.9 * PERIOD_S <= elapsed_s <= 2 * PERIOD_S
        assert await status(health, "") == SERVING  # requests queue
        assert await status(health, "liveness") == SERVING
        await asyncio.sleep(PERIOD_S)  # the link is opened anew meanwhile
        assert await status(health, "progress") == NOT_SERVING
        up.runner.gate.set()
        await output.finished()
        await until_status(health, "progress", SERVING, timeout_s=PERIOD_S)


async def test_a_client_that_vanishes_frees_its_blocks(tmp_path: Path) -> None:
    """Its machine is gone: no packet says so, only pings that nobody answers."""
    processes = Processes(tmp_path, executor_flags=(*EXECUTOR_FLAGS, "--step-ms", 10))
    model = fake_model_dir(tmp_path / "model", VOCAB_SIZE)
    frontend, address = processes.add_frontend(
        model, "--keepalive-s", 1, "--keepalive-timeout-s", 1
    )
    proxy = UdsProxy(tmp_path / "proxy.sock", Path(address.removeprefix("unix:")))
    async with running(processes), proxy, PublicClient(proxy.address) as client:
        await frontend.start()
        await client.serving()
        async with EngineClient(processes.engine_address) as engine:
            await engine.ready()
            stream = asyncio.create_task(client.follow(client.start([1], 4000), Answer()))
            await engine.snapshot_when(lambda shot: num_held_slots(shot) > 0)
            proxy.stall()
            begin = time.monotonic()
            await engine.snapshot_when(lambda shot: num_held_slots(shot) == 0)
            assert time.monotonic() - begin <= 4
            stream.cancel()


async def test_old_connections_are_replaced_and_their_streams_go_on(tmp_path: Path) -> None:
    processes = Processes(tmp_path, executor_flags=(*EXECUTOR_FLAGS, "--step-ms", 10))
    model = fake_model_dir(tmp_path / "model", VOCAB_SIZE)
    frontend, address = processes.add_frontend(model, "--max-connection-age-s", 0.5)
    proxy = UdsProxy(tmp_path / "proxy.sock", Path(address.removeprefix("unix:")))
    async with running(processes), proxy, PublicClient(proxy.address) as client:
        await frontend.start()
        await client.serving()
        first = proxy.num_connections
        long = [asyncio.create_task(client.generate([n], 250)) for n in range(10)]
        num_short = 0
        while not all(stream.done() for stream in long):
            answer = await client.generate([7], 3)
            assert answer.token_ids == reference_output([7], 3, VOCAB_SIZE), answer.details
            num_short += 1
        for number, stream in enumerate(long):
            answer = await stream
            assert answer.token_ids == reference_output([number], 250, VOCAB_SIZE), answer.details
        assert num_short >= 10
        assert proxy.num_connections >= first + 3  # in 2.5 s


async def test_all_told_to_end_at_once_still_end_in_order(tmp_path: Path) -> None:
    """As in a pod, where every container gets SIGTERM at the same time."""
    processes = Processes(
        tmp_path,
        executor_flags=(*EXECUTOR_FLAGS, "--step-ms", 10, "--drain-grace-s", 30),
        engine_flags=("--drain-grace-s", 30),
    )
    model = fake_model_dir(tmp_path / "model", VOCAB_SIZE)
    frontend, address = processes.add_frontend(model, "--lame-duck-s", 0.5)
    async with running(processes), PublicClient(address) as client, health_of(address) as health:
        await frontend.start()
        await client.serving()
        streams = [asyncio.create_task(client.generate([n], 150)) for n in range(20)]
        await asyncio.sleep(0.3)
        everybody = (processes.executor, processes.engine, frontend)
        begin = time.monotonic()
        for process in everybody:
            process.send_signal(signal.SIGTERM)
        await until_status(health, "", NOT_SERVING, timeout_s=0.4)
        assert await status(health, "progress") == NOT_SERVING
        assert await status(health, "liveness") == SERVING
        late = await client.generate([99], 3)  # a lame duck still serves
        assert late.token_ids == reference_output([99], 3, VOCAB_SIZE), late.details
        for number, stream in enumerate(streams):
            answer = await stream
            assert answer.token_ids == reference_output([number], 150, VOCAB_SIZE), answer.details
        assert [await process.exit_code() for process in everybody] == [0, 0, 0]
        assert time.monotonic() - begin < 10


async def test_a_second_signal_ends_each_at_once(tmp_path: Path) -> None:
    processes = Processes(
        tmp_path,
        executor_flags=(*EXECUTOR_FLAGS, "--drain-grace-s", 30),
        engine_flags=("--drain-grace-s", 30),
    )
    frontend, address = processes.add_frontend(fake_model_dir(tmp_path / "model", VOCAB_SIZE))
    async with running(processes), PublicClient(address) as client:
        await frontend.start()
        await client.serving()
        for process in (processes.executor, processes.engine, frontend):
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert process.is_running
            process.send_signal(signal.SIGTERM)
            assert await process.exit_code() == 128 + signal.SIGTERM


async def test_an_engine_has_an_address_for_probes(tmp_path: Path) -> None:
    admin = f"unix:{tmp_path}/admin.sock"
    service = "blockyard.engine.v1.EngineService"
    processes = Processes(tmp_path, executor_flags=EXECUTOR_FLAGS, engine_flags=("--admin", admin))
    await processes.engine.start()
    try:
        await until(lambda: "engine is up" in processes.engine.log())
        async with health_of(admin) as health:
            assert await status(health, "liveness") == SERVING
            assert await status(health, service) == NOT_SERVING
            await processes.executor.start()
            await until_status(health, service, SERVING)
    finally:
        await processes.stop()

"""Mutual TLS between all processes of the service, over TCP; and who is kept out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockyard.client import AsyncClient
from blockyard.common import model_dir
from blockyard.common.link_security import LinkFiles, LinkSecurity
from blockyard.common.tests.authority import DAY, Authority, Pair
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc
from blockyard.executor.v1 import executor_pb2, executor_pb2_grpc
from executor_svc.__main__ import main as executor_main
from executor_svc.backends.checking.runner import FakeRunner, fake_info
from executor_svc.server import ExecutorServer
from integration_tests.harness import fake_model_dir, until
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.__main__ import main as engine_main
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.service import EngineServicer
from scheduler_svc.executor_client import LinkState
from scheduler_svc.frontend.__main__ import main as frontend_main
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.lifecycle import Frontend

EXECUTOR = "spiffe://example.org/executor"
ENGINE = "spiffe://example.org/engine"
FRONTEND = "spiffe://example.org/frontend"
VOCAB_SIZE = 400


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def internal(authority: Authority, pair: Pair) -> dict[str, Any]:
    return {
        "internal_ca": authority.ca,
        "internal_cert": pair.cert,
        "internal_key": pair.key,
    }


@dataclass
class Service:
    """An executor, an engine and a front end, each with a certificate of its own."""

    authority: Authority
    engine: Engine
    engine_address: str
    frontend: Frontend


@contextlib.asynccontextmanager
async def executor_at(listen: str, security: LinkSecurity) -> AsyncIterator[None]:
    server = ExecutorServer(FakeRunner(fake_info(64, vocab_size=VOCAB_SIZE)), listen, security)
    await server.start()
    try:
        yield
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def engine_at(settings: EngineSettings) -> AsyncIterator[Engine]:
    engine = Engine(settings)
    server = engine.security.server(settings.listen)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(engine), server)
    engine.security.bind(server, settings.listen)
    await server.start()
    link = asyncio.create_task(engine.client.run())
    try:
        yield engine
    finally:
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)
        await server.stop(None)


@contextlib.asynccontextmanager
async def frontend_at(settings: FrontendSettings) -> AsyncIterator[Frontend]:
    frontend = Frontend(settings, model_dir.load(settings.model_dir))
    await frontend.start()
    try:
        yield frontend
    finally:
        await frontend.close()


@contextlib.asynccontextmanager
async def service(directory: Path, **engine_settings: Any) -> AsyncIterator[Service]:
    authority = Authority(directory)
    executor = authority.issue("executor", EXECUTOR, "executor.internal")
    engine = authority.issue("engine", ENGINE, "127.0.0.1")
    frontend = authority.issue("frontend", FRONTEND)
    at = {name: free_address() for name in ("executor", "engine")}
    security = LinkSecurity(LinkFiles(authority.ca, executor.cert, executor.key), (ENGINE,))
    settings: dict[str, Any] = {
        "listen": at["engine"],
        "executor": at["executor"],
        "executor_name": "executor.internal",
        "internal_allow": (FRONTEND,),
        "strict": True,
        **internal(authority, engine),
        **engine_settings,
    }
    frontend_settings = FrontendSettings(
        listen="127.0.0.1:0",
        engine=at["engine"],
        model_dir=fake_model_dir(directory / "model", VOCAB_SIZE),
        **internal(authority, frontend),
    )
    async with (
        asyncio.timeout(20),
        executor_at(at["executor"], security),
        engine_at(EngineSettings(**settings)) as engine_,
        frontend_at(frontend_settings) as frontend_,
    ):
        yield Service(authority, engine_, at["engine"], frontend_)


async def state_of(engine: Engine, wanted: LinkState, reason: str = "") -> None:
    """Wait until the engine sees its executor so."""
    name = pb.WatchExecutorResponse.State.Value(f"STATE_{wanted.name}")
    async for update in engine.watch():
        if update.state == name and reason in update.message:
            return


async def snapshot(service: Service, pair: Pair | None) -> str:
    """What one call to the engine as somebody else gives."""
    if pair is None:
        channel = grpc.aio.insecure_channel(service.engine_address)
    else:
        files = LinkFiles(service.authority.ca, pair.cert, pair.key)
        channel = LinkSecurity(files).channel(service.engine_address)
    async with channel:
        stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
        try:
            await stub.Snapshot(pb.SnapshotRequest())
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


async def test_all_links_with_certificates_and_nobody_else(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        await until(lambda: running.frontend.is_ready)
        async with AsyncClient(f"127.0.0.1:{running.frontend.port}") as client:
            answer = await client.complete(token_ids=[1, 2, 3], max_tokens=5, ignore_eos=True)
            assert len(answer.choices[0].token_ids) == 5
        issue = running.authority.issue
        assert await snapshot(running, issue("friend", FRONTEND)) == "OK"
        assert await snapshot(running, issue("other", "spiffe://example.org/x")) == (
            "PERMISSION_DENIED"
        )
        assert await snapshot(running, None) == "UNAVAILABLE"
        stranger = Authority(tmp_path, "strangers").issue("stranger", FRONTEND)
        assert await snapshot(running, stranger) == "UNAVAILABLE"


async def test_an_executor_with_another_name_gets_no_prompt(tmp_path: Path) -> None:
    async with service(tmp_path, executor_name="elsewhere.internal") as running:
        await state_of(running.engine, LinkState.CONNECTING, "its certificate is for another name")
        assert not running.frontend.is_ready


async def test_an_engine_that_is_not_on_the_list_of_the_executor(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    other = authority.issue("other", "127.0.0.1", "spiffe://example.org/other")
    listen = free_address()
    files = LinkFiles(authority.ca, other.cert, other.key)
    settings = EngineSettings(
        listen=f"unix:{tmp_path}/engine.sock", executor=listen, **internal(authority, other)
    )
    async with (
        asyncio.timeout(20),
        executor_at(listen, LinkSecurity(files, (ENGINE,))),
        engine_at(settings) as engine,
    ):
        await state_of(engine, LinkState.CONNECTING, "PERMISSION_DENIED")


async def test_certificates_of_links_are_replaced_under_way(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        await until(lambda: running.frontend.is_ready)
        # A bad one first: connections are made with the one before.
        running.authority.issue("engine", ENGINE, "127.0.0.1", begin=-2 * DAY, end=-DAY)
        await _reconnect(running)
        running.authority.issue("engine", ENGINE, "127.0.0.1", begin=-DAY, end=3 * DAY)
        await _reconnect(running)


async def _reconnect(running: Service) -> None:
    epoch = running.engine.client.epoch
    running.engine.client.reset("the test asks for it")
    await until(lambda: running.engine.client.epoch > epoch and running.engine.client.is_ready)


@pytest.mark.parametrize(
    ("run", "flags"),
    [
        (engine_main, ("--listen", "127.0.0.1:1", "--executor", "unix:/e")),
        (engine_main, ("--listen", "unix:/e", "--executor", "executor:1")),
        (frontend_main, ("--listen", "127.0.0.1:0", "--engine", "engine:1", "--model-dir", "/m")),
        (executor_main, ("--listen", "0.0.0.0:1", "--model-dir", "/m")),
    ],
)
def test_internal_addresses_over_tcp_are_refused_unless_asked_for(
    run: Any, flags: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(list(flags)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is an internal address that others could use" in lines[0]
    # With the flag, what is wrong is something else; certificates that are missing are named.
    files = {name: tmp_path / name for name in ("ca", "cert", "key")}
    given = [text for name, path in files.items() for text in (f"--internal-{name}", str(path))]
    assert run([*flags, *given[:2]]) == 2
    assert "--internal-ca, --internal-cert and --internal-key go together" in capfd.readouterr().err


def test_bad_files_end_the_process_at_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(tmp_path)
    old = authority.issue("old", "127.0.0.1", begin=-2 * DAY, end=-DAY)
    flags = ["--listen", free_address(), "--executor", f"unix:{tmp_path}/e"]
    files = ["--internal-ca", str(authority.ca), "--internal-cert", str(old.cert)]
    assert engine_main([*flags, *files, "--internal-key", str(old.key)]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"{old.cert}: the certificate expired on" in last
    model = fake_model_dir(tmp_path / "model")
    flags = ["--listen", "127.0.0.1:0", "--engine", f"unix:{tmp_path}/e", "--model-dir", str(model)]
    for more, message in (
        (["--auth-tokens", f"{tmp_path}/none"], "none: cannot be read (No such file or directory)"),
        (["--tls-cert", str(old.cert), "--tls-key", str(old.key)], "the certificate expired on"),
        (["--tls-cert", str(old.cert)], "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", str(old.cert)], "--tls-client-ca needs --tls-cert and --tls-key"),
    ):
        assert frontend_main([*flags, *more]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]


async def test_probes_without_tls_have_an_address_of_their_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("executor", EXECUTOR, "executor.internal")
    security = LinkSecurity(LinkFiles(authority.ca, pair.cert, pair.key), (ENGINE,))
    listen, admin = free_address(), free_address()
    runner = FakeRunner(fake_info(64, vocab_size=VOCAB_SIZE))
    server = ExecutorServer(runner, listen, security, admin)
    await server.start()
    try:
        request = health_pb2.HealthCheckRequest(service="liveness")
        async with grpc.aio.insecure_channel(admin) as probe:
            health: Any = health_pb2_grpc.HealthStub(probe)  # its stubs name no methods
            answer = await health.Check(request, timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await executor_pb2_grpc.ExecutorServiceStub(probe).Describe(
                    executor_pb2.DescribeRequest(), timeout=5
                )
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        async with grpc.aio.insecure_channel(listen) as stranger:
            health = health_pb2_grpc.HealthStub(stranger)
            with pytest.raises(grpc.aio.AioRpcError):
                await health.Check(request, timeout=5)
    finally:
        await server.stop()

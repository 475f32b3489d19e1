"""Who may call the public service, and how much one client and one request may take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blockyard.client import BlockyardError
from blockyard.client.errors import from_rpc
from blockyard.common.tests.authority import DAY, Authority
from blockyard.common.tls import Tls
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc
from scheduler_svc.frontend.lifecycle import Frontend
from scheduler_svc.frontend.tests import conftest
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, finished

ALICE = "alice-0123456789abcdef"
TIMEOUT_S = 10.0
BOB = "bob-0123456789abcdef"


class Server:
    """A ready front end with settings of its own, and channels to it."""

    def __init__(self, frontend: Frontend, engine: FakeEngine) -> None:
        self.frontend = frontend
        self.engine = engine
        self._channels: list[grpc.aio.Channel] = []

    def channel(self, tls: Tls | None = None) -> grpc.aio.Channel:
        """A new connection."""
        address = f"127.0.0.1:{self.frontend.port}"
        options: Any = [("grpc.use_local_subchannel_pool", 1)]
        if tls is None:
            channel = grpc.aio.insecure_channel(address, options)
        else:
            options += tls.channel_options()
            channel = grpc.aio.secure_channel(address, tls.channel_credentials(), options)
        self._channels.append(channel)
        return channel

    def stub(self, tls: Tls | None = None) -> generate_pb2_grpc.GenerateServiceAsyncStub:
        stub: generate_pb2_grpc.GenerateServiceAsyncStub
        stub = generate_pb2_grpc.GenerateServiceStub(self.channel(tls))
        return stub

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@contextlib.asynccontextmanager
async def serving(directory: Path, **settings: Any) -> AsyncIterator[Server]:
    async with conftest.serving(directory, **settings) as (frontend, engine):
        server = Server(frontend, engine)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                yield server
        finally:
            await server.close()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def error_of(call: Any) -> BlockyardError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


def token_file(directory: Path, text: str = f"alice {ALICE}\nbob {BOB}\n") -> Path:
    path = directory / "tokens"
    path.write_text(text)
    return path


async def test_only_who_has_a_token_may_call(tmp_path: Path) -> None:
    async with serving(tmp_path, auth_tokens=token_file(tmp_path)) as server:
        stub, request = server.stub(), pb.GetModelRequest()
        assert (await stub.GetModel(request, metadata=bearer(ALICE))).name
        lower = (("authorization", f"bearer {BOB}"),)
        assert (await stub.GetModel(request, metadata=lower)).name
        for metadata in (
            (),
            bearer(ALICE + "x"),
            bearer(""),
            (("authorization", ALICE),),
            (("authorization", f"Basic {ALICE}"),),
            (*bearer(ALICE), *bearer(BOB)),
        ):
            error = await error_of(stub.GetModel(request, metadata=metadata))
            assert (error.code, error.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
            assert not error.is_retryable
        call = stub.Generate(pb.GenerateRequest(prompt="a"))
        assert (await error_of(call.read())).reason == "UNAUTHENTICATED"
        assert (await error_of(stub.GenerateUnary(pb.GenerateRequest(prompt="a")))).reason
        assert server.engine.submits.empty()


async def test_health_needs_no_token_and_reflection_does(tmp_path: Path) -> None:
    async with serving(tmp_path, auth_tokens=token_file(tmp_path)) as server:
        channel = server.channel()
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub
        reflection = stub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        refused = reflection.ServerReflectionInfo(iter([request]))
        assert (await error_of(refused.read())).reason == "UNAUTHENTICATED"
        allowed = reflection.ServerReflectionInfo(iter([request]), metadata=bearer(ALICE))
        assert (await allowed.read()).list_services_response.service


async def test_a_token_file_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("scheduler_svc.frontend.access._LOOK_EVERY_S", 0.0)
    path = token_file(tmp_path)
    async with serving(tmp_path, auth_tokens=path) as server:
        stub, request = server.stub(), pb.GetModelRequest()
        await stub.GetModel(request, metadata=bearer(ALICE))
        path.write_text(f"carol {ALICE[::-1]}\n")
        assert (await error_of(stub.GetModel(request, metadata=bearer(ALICE)))).reason
        await stub.GetModel(request, metadata=bearer(ALICE[::-1]))
        for damage in ("", "nonsense", f"dave {BOB[:5]}"):
            path.write_text(damage)
            await stub.GetModel(request, metadata=bearer(ALICE[::-1]))
        path.unlink()
        await stub.GetModel(request, metadata=bearer(ALICE[::-1]))
    problems = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(problems) == 4
    assert all(problem.endswith("what was read before stays in use") for problem in problems)
    assert BOB[:5] not in caplog.text


async def test_streams_of_one_client_are_bounded(tmp_path: Path) -> None:
    settings = {"auth_tokens": token_file(tmp_path), "max_client_streams": 2}
    async with serving(tmp_path, **settings) as server:
        stub, request = server.stub(), pb.GenerateRequest(prompt="a")
        calls, submits = [], []
        for _ in range(2):  # one after the other, so that each has its own submit
            calls.append(stub.Generate(request, metadata=bearer(ALICE)))
            submits.append((await server.engine.next_submit())[0])
        for kind in (stub.GenerateUnary(request, metadata=bearer(ALICE)),):
            error = await error_of(kind)
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS")
            assert error.is_retryable
            assert error.message == "alice has 2 calls open, as many as it may"
        other = asyncio.create_task(_unary(stub, request, BOB))
        submit, _ = await server.engine.next_submit()
        await server.engine.send_tokens(submit.request_id, [50], finished("LENGTH"))
        await other
        # One ends, another is cancelled: then two more are taken.
        await server.engine.send_tokens(submits[0].request_id, [50], finished("LENGTH"))
        while await calls[0].read() is not grpc.aio.EOF:
            pass
        calls[1].cancel()
        await server.engine.next_stop()
        again = [stub.Generate(request, metadata=bearer(ALICE)) for _ in range(2)]
        for _ in again:
            await server.engine.next_submit()


async def _unary(
    stub: generate_pb2_grpc.GenerateServiceAsyncStub, request: pb.GenerateRequest, token: str
) -> None:
    await stub.GenerateUnary(request, metadata=bearer(token))


async def test_without_tokens_a_client_is_its_address(tmp_path: Path) -> None:
    async with serving(tmp_path, max_client_streams=1) as server:
        request = pb.GenerateRequest(prompt="a")
        call = server.stub().Generate(request)
        await server.engine.next_submit()
        error = await error_of(server.stub().GenerateUnary(request))
        assert error.message == "127.0.0.1 has 1 calls open, as many as it may"
        call.cancel()


async def test_what_a_request_may_take(tmp_path: Path) -> None:
    async with serving(tmp_path, max_request_bytes=2048, max_prompt_tokens=8) as server:
        stub = server.stub()
        for request, message in (
            (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3] * 9)), "has 9 prompt tokens"),
            (pb.GenerateRequest(prompt="a b c d e f g h i j"), "prompt tokens; this server takes"),
            (pb.GenerateRequest(prompt="word " * 300), "has far more prompt tokens"),
            (pb.GenerateRequest(prompt="x" * 2100), "bytes; this server takes 2048"),
        ):
            error = await error_of(stub.GenerateUnary(request))
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
            assert message in error.message
            assert not error.is_retryable
        huge = await error_of(stub.GenerateUnary(pb.GenerateRequest(prompt="x" * 8300)))
        assert (huge.code, huge.reason) == ("RESOURCE_EXHAUSTED", "")
        call = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3] * 8)))
        await server.engine.next_submit()
        call.cancel()


async def test_tls_and_certificates_of_clients(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "localhost", "127.0.0.1")
    alice = authority.issue("alice", "spiffe://example.org/alice")
    settings = {"tls_cert": pair.cert, "tls_key": pair.key, "tls_client_ca": authority.ca}
    async with serving(tmp_path, max_client_streams=1, **settings) as server:
        stub = server.stub(Tls(authority.ca, alice.cert, alice.key))
        call = stub.Generate(pb.GenerateRequest(prompt="a"))
        await server.engine.next_submit()
        error = await error_of(stub.GenerateUnary(pb.GenerateRequest(prompt="a")))
        assert error.message == "spiffe://example.org/alice has 1 calls open, as many as it may"
        call.cancel()
        for tls in (None, Tls(authority.ca)):
            error = await error_of(server.stub(tls).GetModel(pb.GetModelRequest()))
            assert error.code == "UNAVAILABLE"


async def test_a_rotated_certificate_is_served_to_new_connections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    async with serving(tmp_path, tls_cert=pair.cert, tls_key=pair.key) as server:
        first = server.stub(Tls(authority.ca))
        await first.GetModel(pb.GetModelRequest())
        # Bad ones are reported, and the one before is kept.
        authority.issue("server", "127.0.0.1", begin=-2 * DAY, end=-DAY)
        await server.stub(Tls(authority.ca)).GetModel(pb.GetModelRequest())
        assert "the certificate expired on" in caplog.text
        other = Authority(tmp_path, "other")
        other.issue("server", "127.0.0.1")
        await server.stub(Tls(other.ca)).GetModel(pb.GetModelRequest())
        error = await error_of(server.stub(Tls(authority.ca)).GetModel(pb.GetModelRequest()))
        assert error.code == "UNAVAILABLE"
        await first.GetModel(pb.GetModelRequest())  # began with the old one, and goes on


@pytest.mark.parametrize("is_secure", [False, True])
async def test_token_and_certificate_are_both_asked_for(tmp_path: Path, is_secure: bool) -> None:
    authority = Authority(tmp_path)
    pair, own = authority.issue("server", "127.0.0.1"), authority.issue("own", "alice.example")
    settings = {"tls_cert": pair.cert, "tls_key": pair.key, "tls_client_ca": authority.ca}
    async with serving(tmp_path, auth_tokens=token_file(tmp_path), **settings) as server:
        tls = Tls(authority.ca, own.cert, own.key) if is_secure else Tls(authority.ca)
        stub = server.stub(tls)
        if is_secure:
            await stub.GetModel(pb.GetModelRequest(), metadata=bearer(ALICE))
            assert (await error_of(stub.GetModel(pb.GetModelRequest()))).reason
        else:
            call = stub.GetModel(pb.GetModelRequest(), metadata=bearer(ALICE))
            assert (await error_of(call)).code == "UNAVAILABLE"

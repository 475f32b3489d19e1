"""Handshakes: who is trusted, what is said when one fails, and certificates that are replaced."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockyard.common.grpc_options import short_reason
from blockyard.common.guards import PeerAllowList
from blockyard.common.reloading import FileError
from blockyard.common.tests.authority import DAY, Authority, Pair
from blockyard.common.tls import ServerTls, Tls, server_credentials


class Health(health_pb2_grpc.HealthServicer):
    """One answer, and a stream of two."""

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)


@contextlib.asynccontextmanager
async def serving(
    credentials: grpc.ServerCredentials | None, allow: tuple[str, ...] = ()
) -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=[PeerAllowList(allow)] if allow else None)
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def health(port: int, tls: Tls | None, host: str = "localhost") -> AsyncIterator[Any]:
    """A stub with a connection of its own."""
    options: Any = [("grpc.use_local_subchannel_pool", 1)]
    address = f"{host}:{port}"
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options)
    else:
        options += tls.channel_options()
        channel = grpc.aio.secure_channel(address, tls.channel_credentials(), options)
    async with channel:
        yield health_pb2_grpc.HealthStub(channel)


async def check(port: int, tls: Tls | None, host: str = "localhost") -> str:
    """What comes of one call: OK, or why not in one line."""
    async with health(port, tls, host) as stub:
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return short_reason(error, "the server").removeprefix("UNAVAILABLE: ")
    return "OK"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def own(authority: Authority) -> Pair:
    return authority.issue("server", "localhost", "server.internal")


async def test_what_is_said_of_servers_that_are_not_trusted(
    authority: Authority, own: Pair, tmp_path: Path
) -> None:
    trusting = Tls(authority.ca)
    async with serving(server_credentials(ServerTls(own.cert, own.key))) as port:
        assert await check(port, trusting) == "OK"
        assert await check(port, Tls(str(authority.ca), server_name="server.internal"), "127.0.0.1")
        refused = (
            "no connection to the server: its certificate is refused: "
            "unable to get local issuer certificate"
        )
        assert await check(port, Tls()) == refused
        assert await check(port, Tls(Authority(tmp_path, "other").ca)) == refused
        other_name = "no connection to the server: its certificate is for another name"
        assert await check(port, trusting, "127.0.0.1") == other_name
        assert await check(port, Tls(authority.ca, server_name="other.internal")) == other_name
        assert "it hung up; it may want TLS" in await check(port, None)
    async with serving(None) as port:
        assert await check(port, trusting) == "no connection to the server: it does not speak TLS"
    old = authority.issue("old", "localhost", begin=-2 * DAY, end=-DAY)
    files = [(old.key.read_bytes(), old.cert.read_bytes())]
    async with serving(grpc.ssl_server_credentials(files)) as port:
        assert await check(port, trusting) == (
            "no connection to the server: its certificate is refused: certificate has expired"
        )


async def test_clients_without_a_certificate_that_counts(
    authority: Authority, own: Pair, tmp_path: Path
) -> None:
    client = authority.issue("client", "spiffe://example.org/engine")
    stranger = Authority(tmp_path, "other").issue("stranger", "spiffe://example.org/engine")
    credentials = server_credentials(ServerTls(own.cert, own.key, authority.ca))
    async with serving(credentials) as port:
        assert await check(port, Tls(authority.ca, client.cert, client.key)) == "OK"
        for pair in (None, stranger):
            tls = Tls(authority.ca, pair.cert, pair.key) if pair else Tls(authority.ca)
            assert "certificate of the client that it knows" in await check(port, tls)


async def test_only_names_on_the_list_may_call(authority: Authority, own: Pair) -> None:
    engine = authority.issue("engine", "spiffe://example.org/engine", "engine.internal")
    other = authority.issue("other", "spiffe://example.org/engine2")
    unnamed = authority.issue("engine.internal", "127.0.0.1")  # only its common name matches
    for allow in (("spiffe://example.org/engine",), ("engine.internal", "x")):
        credentials = server_credentials(ServerTls(own.cert, own.key, authority.ca))
        async with serving(credentials, allow) as port:
            tls = Tls(authority.ca, engine.cert, engine.key)
            assert await check(port, tls) == "OK"
            async with health(port, tls) as stub:
                answers = [
                    each.status async for each in stub.Watch(health_pb2.HealthCheckRequest())
                ]
            assert answers == [1, 2]
            for pair in (other, unnamed):
                tls = Tls(authority.ca, pair.cert, pair.key)
                assert (await check(port, tls)).startswith("PERMISSION_DENIED: the certificate of ")
                async with health(port, tls) as stub:
                    with pytest.raises(grpc.aio.AioRpcError, match="may not call here"):
                        await stub.Watch(health_pb2.HealthCheckRequest()).read()


async def test_new_handshakes_see_new_certificates(
    authority: Authority, own: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = server_credentials(ServerTls(own.cert, own.key))
    old, new = Tls(authority.ca), Authority(tmp_path, "new")
    async with serving(credentials) as port, health(port, old) as stub:
        await stub.Check(health_pb2.HealthCheckRequest())
        good = own.key.read_bytes()
        for damage in (b"", b"nonsense", authority.issue("x", "localhost").key.read_bytes()):
            own.key.write_bytes(damage)
            assert await check(port, old) == "OK"
        own.key.write_bytes(good)
        authority.issue("server", "localhost", begin=DAY, end=2 * DAY)
        assert await check(port, old) == "OK"
        problems = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert len(problems) == 4
        assert all(each.endswith("what was read before stays in use") for each in problems)
        new.issue("server", "localhost")
        assert await check(port, Tls(new.ca)) == "OK"
        assert "certificate is refused" in await check(port, old)
        await stub.Check(health_pb2.HealthCheckRequest())  # a connection that was open goes on


def test_files_of_a_client(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("client", "alice")
    with pytest.raises(FileError, match="a certificate and its key go together"):
        Tls(authority.ca, cert=pair.cert).channel_credentials()
    with pytest.raises(FileError, match="missing: cannot be read"):
        Tls(tmp_path / "missing").channel_credentials()
    with pytest.raises(FileError, match="holds no certificate"):
        Tls(pair.key).channel_credentials()

"""Clients with TLS and tokens, and what they say when they cannot connect."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from blockyard.client import AsyncClient, BlockyardError, Client, Tls
from blockyard.client.tests.scripted_server import ScriptedServer, scripted_server
from blockyard.common.tests.authority import DAY, Authority

TOKEN = "alice-0123456789abcdef"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def credentials_of(authority: Authority) -> grpc.ServerCredentials:
    pair = authority.issue("server", "127.0.0.1")
    return grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.cert.read_bytes())],
        authority.ca.read_bytes(),
        require_client_auth=True,
    )


async def test_both_clients_send_token_and_certificate(authority: Authority) -> None:
    own = authority.issue("own", "alice.example")
    tls = Tls(authority.ca, own.cert, own.key)
    with scripted_server(credentials=credentials_of(authority)) as server:
        with Client(server.address, tls=tls, token=TOKEN) as client:
            client.model()
            client.complete("a")
            assert len(list(client.generate("a"))) == 2
        async with AsyncClient(server.address, tls=tls, token=TOKEN) as other:
            await other.model()
            await other.complete("a")
            assert len([chunk async for chunk in other.generate("a")]) == 2
    assert server.tokens == [f"Bearer {TOKEN}"] * 6


def test_no_token_is_sent_unless_given(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        client.model()
    assert server.tokens == [""]


def test_a_token_does_not_travel_in_the_clear(server: ScriptedServer) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(
            BlockyardError, match=r"would go to example\.org:1 unencrypted"
        ) as caught:
            kind("example.org:1", token=TOKEN)
        assert TOKEN not in str(caught.value)
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/s"):
        Client(address, token=TOKEN).close()
    Client("example.org:1", token=TOKEN, allow_insecure_token=True).close()
    Client("example.org:1", token=TOKEN, tls=Tls()).close()


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "caf\u00e9-0123456789"])
def test_what_cannot_be_a_token(token: str) -> None:
    with pytest.raises(BlockyardError, match="the token is not one") as caught:
        Client(token=token)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not token or token not in str(caught.value)


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    old = authority.issue("old", "alice.example", begin=-2 * DAY, end=-DAY)
    for tls, message in (
        (Tls(tmp_path / "missing"), "missing: cannot be read (No such file or directory)"),
        (Tls(authority.ca, old.cert, old.key), "the certificate expired on"),
        (Tls(authority.ca, cert=old.cert), "a certificate and its key go together"),
    ):
        with pytest.raises(BlockyardError) as caught:
            Client(tls=tls)
        assert caught.value.code == "INVALID_ARGUMENT"
        assert message in caught.value.message
        assert "\n" not in caught.value.message


def test_why_there_is_no_connection(authority: Authority, server: ScriptedServer) -> None:
    def problem(address: str, tls: Tls | None) -> str:
        with Client(address, tls=tls) as client, pytest.raises(BlockyardError) as caught:
            client.model()
        assert caught.value.code == "UNAVAILABLE"
        return caught.value.message.removeprefix("no connection to the server: ")

    trusting = Tls(authority.ca)
    assert problem(server.address, trusting) == "it does not speak TLS"
    with scripted_server(credentials=credentials_of(authority)) as secure:
        refused = "its certificate is refused: unable to get local issuer certificate"
        assert problem(secure.address, Tls()) == refused
        name = Tls(authority.ca, server_name="example.org")
        assert problem(secure.address, name) == "its certificate is for another name"
        for tls in (None, trusting):
            assert "it hung up; it may want TLS, or a certificate" in problem(secure.address, tls)

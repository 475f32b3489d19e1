"""Options of TLS and tokens, and what the commands say when these are wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from blockyard.cli.tests.conftest import Run
from blockyard.client.tests.scripted_server import ScriptedServer, scripted_server
from blockyard.common.tests.authority import Authority

TOKEN = "alice-0123456789abcdef"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def secure(authority: Authority) -> Iterator[ScriptedServer]:
    pair = authority.issue("server", "127.0.0.1")
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.cert.read_bytes())],
        authority.ca.read_bytes(),
        require_client_auth=True,
    )
    with scripted_server(credentials=credentials) as server:
        yield server


def test_commands_with_tls_and_a_token(
    run: Run,
    secure: ScriptedServer,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = authority.issue("own", "alice.example")
    tokens, requests = tmp_path / "token", tmp_path / "requests"
    tokens.write_text(f"{TOKEN}\n")
    requests.write_text('{"prompt": "a"}\n')
    at = ["--address", secure.address, "--ca", str(authority.ca)]
    at += ["--cert", str(own.cert), "--key", str(own.key)]
    outcome = run("generate", "hi", *at, "--token-file", str(tokens), "--priority", "-3")
    assert (outcome.exit_code, outcome.out) == (0, "one two\n")
    assert secure.requests[-1].priority == -3
    monkeypatch.setenv("BLOCKYARD_TOKEN_FILE", str(tokens))
    assert run("generate", "--file", str(requests), *at).exit_code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert "one two" in run("chat", *at).out
    assert set(secure.tokens) == {f"Bearer {TOKEN}"}


def test_a_server_that_is_not_trusted(run: Run, secure: ScriptedServer, tmp_path: Path) -> None:
    at = ["--address", secure.address]
    outcome = run("generate", "hi", *at, "--ca", str(Authority(tmp_path, "other").ca))
    assert outcome.exit_code == 1
    assert outcome.err == (
        "blockyard: UNAVAILABLE: no connection to the server: its certificate is refused: "
        "unable to get local issuer certificate\n"
    )
    assert "it may want TLS" in run("generate", "hi", *at).err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cert", "x"), "--cert, --key and --server-name go with --ca or --tls"),
        (("--server-name", "x"), "--cert, --key and --server-name go with --ca or --tls"),
        (("--ca", "/no/such"), "/no/such: cannot be read (No such file or directory)"),
        (("--tls", "--cert", "/no/such"), "a certificate and its key go together"),
        (("--token-file", "/no/such"), "/no/such: cannot be read (No such file or directory)"),
        (("--priority", "11"), "--priority"),
        (("--priority", "high"), "--priority"),
    ],
)
def test_bad_options(flags: tuple[str, ...], message: str, run: Run) -> None:
    outcome = run("generate", "hi", *flags)
    assert outcome.exit_code in (1, 2)
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_token_files_that_hold_none(run: Run, tmp_path: Path) -> None:
    for content, message in (("", "holds no token"), ("two words\n", "the token is not one")):
        (tmp_path / "token").write_text(content)
        outcome = run("generate", "hi", "--token-file", str(tmp_path / "token"))
        assert outcome.exit_code in (1, 2)
        assert message in outcome.err
    (tmp_path / "token").write_text(TOKEN)
    outcome = run(
        "generate", "hi", "--address", "example.org:1", "--token-file", str(tmp_path / "token")
    )
    assert "unencrypted" in outcome.err
    assert TOKEN not in outcome.err


def test_top_with_certificates(run: Run, secure: ScriptedServer, authority: Authority) -> None:
    own = authority.issue("own", "alice.example")
    at = ["--engine", secure.address, "--ca", str(authority.ca)]
    outcome = run("top", "--once", *at, "--cert", str(own.cert), "--key", str(own.key))
    assert "is not an engine" in outcome.err  # but what answered was asked over TLS
    assert "a certificate of the client" in run("top", "--once", *at).err
    assert "cannot be read" in run("top", "--once", "--engine", "h:1", "--ca", "/no/such").err

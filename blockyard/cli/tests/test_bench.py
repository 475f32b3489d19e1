from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from blockyard.bench.tests.token_server import token_server
from blockyard.cli.tests.conftest import Run
from blockyard.common.tests.authority import Authority


def test_figures_are_printed_and_written(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with token_server() as server:
        flags = ["--workload", "W2", "--num-requests", "2", "--clients", "2"]
        outcome = run(
            "bench", "serve", "--address", server.address, *flags, "--output", str(output)
        )
    assert outcome.exit_code == 0
    assert outcome.out.startswith("W2: 2 requests, 128 prompt and 512 output tokens each\n")
    assert "tokens on a test" in outcome.out
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        assert f"\n{name} " in outcome.out
    written = json.loads(output.read_text())
    assert written["load"]["num_output_tokens"] == 1024
    assert written["load"]["tpot_ms"]["count"] == 2
    assert written["model"]["device"] == "a test"
    assert written["spec"]["kind"] == "W2"
    assert written["versions"]["python"]
    assert written["machine"]["cores"] >= 1


def test_failures_give_exit_code_1(run: Run) -> None:
    with token_server(failing_length=128) as server:
        outcome = run(
            *("bench", "serve", "--address", server.address),
            *("--workload", "W2", "--num-requests", "1"),
        )
    assert outcome.exit_code == 1
    assert "1 failed: INTERNAL: this one fails" in outcome.out
    assert outcome.err.endswith("blockyard: 1 requests failed\n")


def test_a_server_with_tls_and_a_token(run: Run, tmp_path: Path) -> None:
    authority, token = Authority(tmp_path), "alice-0123456789abcdef"
    pair = authority.issue("server", "127.0.0.1")
    identity = (pair.key.read_bytes(), pair.cert.read_bytes())
    (tmp_path / "token").write_text(token)
    output = tmp_path / "out.json"
    with token_server(credentials=grpc.ssl_server_credentials([identity])) as server:
        outcome = run(
            *("bench", "serve", "--address", server.address, "--workload", "W2"),
            *("--num-requests", "1", "--ca", str(authority.ca), "--output", str(output)),
            *("--token-file", str(tmp_path / "token")),
        )
    assert outcome.exit_code == 0, outcome.err
    assert server.metadata["authorization"] == f"Bearer {token}"
    assert json.loads(output.read_text())["options"]["server"] == server.address
    assert token not in output.read_text()


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        (["--workload", "W9"], 2, "'W9' is not one of"),
        (["--workload", "L"], 2, "blockyard: --batch goes with workload L"),
        (["--workload", "A"], 2, "blockyard: workload A needs --rate"),
        (["--trace", "/no/such.csv"], 2, "/no/such.csv: No such file"),
        (["--address", "127.0.0.1:1"], 1, "blockyard: no server at 127.0.0.1:1; start one"),
        (["--output", "/no/such/file"], 2, "/no/such/file: No such file"),
    ],
)
def test_bad_input(run: Run, flags: list[str], exit_code: int, message: str) -> None:
    outcome = run("bench", "serve", *flags)
    assert (outcome.exit_code, message in outcome.err) == (exit_code, True), outcome.err

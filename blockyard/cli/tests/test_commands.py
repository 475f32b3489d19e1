from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockyard.cli.tests.conftest import Run
from blockyard.client.tests.scripted_server import ScriptedServer, scripted_server
from blockyard.models.tests.tiny_gguf import TinyGguf


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["chat"], ["serve"], ["demo"], ["models"], ["models", "import"]]
)
def test_help(command: list[str], run: Run) -> None:
    outcome = run(*command, "--help")
    assert outcome.exit_code == 0
    assert outcome.out.startswith("Usage: blockyard")


def test_unknown_command(run: Run) -> None:
    outcome = run("sever")
    assert outcome.exit_code == 2
    assert "No such command 'sever'" in outcome.err


def test_generate_streams_a_chat_message(run: Run, server: ScriptedServer) -> None:
    outcome = run(
        "generate", "hi", "--address", server.address, "--temperature", "0", "--stop", "."
    )
    assert (outcome.exit_code, outcome.out) == (0, "one two\n")
    (request,) = server.requests
    assert [message.content for message in request.chat.messages] == ["hi"]
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_k")
    assert list(request.stop.strings) == ["."]


def test_generate_raw(run: Run, server: ScriptedServer) -> None:
    assert run("generate", "hi", "--raw", "--address", server.address).exit_code == 0
    assert server.requests[0].prompt == "hi"
    with scripted_server(has_chat_template=False) as plain:
        run("generate", "hi", "--address", plain.address)
        run("generate", "hi", "--chat", "--address", plain.address)
        assert [request.WhichOneof("input") for request in plain.requests] == ["prompt", "chat"]


def test_no_server_is_one_clear_line(run: Run) -> None:
    for command in (["generate", "hi"], ["chat"]):
        outcome = run(*command, "--address", "127.0.0.1:1")
        assert outcome.exit_code == 1
        assert outcome.err == (
            "blockyard: no server at 127.0.0.1:1; start one with: blockyard serve\n"
        )


def test_errors_of_the_server_are_one_line(run: Run, server: ScriptedServer) -> None:
    outcome = run("generate", "--raw", "fail", "--address", server.address)
    assert (outcome.exit_code, outcome.out) == (1, "")
    assert outcome.err == "blockyard: sampling.top_p: out of range\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a PROMPT or --file"),
        (["hi", "--top-p", "2"], "--top-p"),
        (["hi", "--max-tokens", "0"], "--max-tokens"),
        (["--file", "/no/such/file"], "does not exist"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, run: Run) -> None:
    outcome = run("generate", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err


def test_batch_keeps_order_and_survives_bad_lines(
    run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    lines = [
        '{"prompt": "a", "temperature": 0.5}',
        '{"id": "second", "messages": [{"role": "user", "content": "b"}]}',
        "",
        "{not json",
        '{"id": 4, "prompt": "c", "colour": "red"}',
        "[1]",
        '{"token_ids": [1, 2], "max_tokens": 3}',
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["--file", str(source), "--output", str(output), "--concurrency", "2"]
    outcome = run("generate", *arguments, "--seed", "5", "--address", server.address)
    assert outcome.exit_code == 1
    assert "3 request(s) failed" in outcome.err
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["index"] for result in results] == list(range(6))
    assert [result.get("text") for result in results] == ["A", "B", None, None, None, ""]
    assert [result.get("id") for result in results] == [None, "second", None, 4, None, None]
    assert results[0]["usage"]["seed"] == 77
    for index, message in ((2, "not valid JSON"), (3, "colour"), (4, "not a JSON object")):
        assert results[index]["error"]["code"] == "INVALID_ARGUMENT"
        assert message in results[index]["error"]["message"]
    sent = {request.WhichOneof("input"): request for request in server.requests}
    assert all(request.sampling.seed == 5 for request in server.requests)
    assert sent["token_ids"].stop.max_tokens == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "timeout": "abc"}', "timeout"),
        (b'{"prompt": "a", "self": 1}', "self"),
        (b'{"prompt": 5}', "prompt"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\xff"}', ""),
    ],
)
def test_no_line_can_stop_the_batch(
    line: bytes, message: str, run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + line + b'\n{"id": "\\ud800", "prompt": "b"}\n')
    arguments = ["--file", str(source), "--output", str(output), "--raw"]
    outcome = run("generate", *arguments, "--address", server.address)
    assert outcome.exit_code == 1
    bad, good = (json.loads(result) for result in output.read_text().splitlines())
    assert message in bad["error"]["message"]
    assert good["text"] == "B"


def test_a_failed_batch_leaves_its_files_alone(
    run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n')
    output.write_text("results of yesterday\n")
    files = ["generate", "--file", str(source), "--output"]
    assert run(*files, str(output), "--address", "127.0.0.1:1").exit_code == 1
    assert output.read_text() == "results of yesterday\n"
    assert run(*files, str(source), "--address", server.address).exit_code == 2
    assert source.read_text() == '{"prompt": "a"}\n'
    missing = tmp_path / "missing" / "out.jsonl"
    assert run(*files, str(missing), "--address", server.address).exit_code == 2


def test_batch_to_standard_output(run: Run, server: ScriptedServer, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "p{n}"}}\n' for n in range(50)))
    outcome = run("generate", "--raw", "--file", str(source), "--address", server.address)
    assert outcome.exit_code == 0
    texts = [json.loads(line)["text"] for line in outcome.out.splitlines()]
    assert texts == [f"P{n}" for n in range(50)]


def test_batch_without_a_server(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    outcome = run("generate", "--file", str(source), "--address", "127.0.0.1:1")
    assert outcome.exit_code == 1
    assert "no server at" in outcome.err


def _typing(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_chat_keeps_history_until_cleared(
    run: Run, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _typing(monkeypatch, "hi", "", "more", KeyboardInterrupt, "/help", "/clear", "again", "/quit")
    outcome = run("chat", "--system", "Be brief.", "--address", server.address)
    assert outcome.exit_code == 0
    assert outcome.out.count("one two\n") == 3
    assert "[3 tokens, first after" in outcome.err
    histories = [
        [(message.role, message.content) for message in request.chat.messages]
        for request in server.requests
    ]
    system, answer = ("system", "Be brief."), ("assistant", "one two")
    assert histories == [
        [system, ("user", "hi")],
        [system, ("user", "hi"), answer, ("user", "more")],
        [system, ("user", "again")],
    ]


def test_piped_chat_prints_answers_alone(
    run: Run, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nmore"))
    outcome = run("chat", "--address", server.address)
    assert (outcome.exit_code, outcome.out) == (0, "one two\none two\n")


def test_chat_needs_a_template(run: Run) -> None:
    with scripted_server(has_chat_template=False) as server:
        outcome = run("chat", "--address", server.address)
    assert outcome.exit_code == 1
    assert "has no chat template" in outcome.err


def test_interrupting_an_answer_keeps_the_conversation(
    run: Run, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    echoed = []

    def echo(text: object = "", **_: object) -> None:
        echoed.append(text)
        if text == "one " and len(server.requests) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("blockyard.cli.chat.click.echo", echo)
    _typing(monkeypatch, "hi", "go on")
    # A shell's background jobs start with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("chat", "--address", server.address).exit_code == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert " [stopped]" in echoed
    contents = [message.content for message in server.requests[1].chat.messages]
    assert contents == ["hi", "one ", "go on"]


def test_models_import_and_list(run: Run, tmp_path: Path) -> None:
    assert run("models", "list").out == ""
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    outcome = run("models", "import", str(path), "--name", "mine")
    assert outcome.exit_code == 0
    assert outcome.out == f"mine: {tmp_path / 'home' / 'models' / 'mine'}\n"
    assert "importing mine" in outcome.err
    assert run("models", "list").out.split()[:2] == ["mine", "llama"]


def test_a_bad_model_is_one_line_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    for command in (["models", "import", str(bad)], ["serve", "--model", str(bad)]):
        outcome = run(*command)
        assert outcome.exit_code == 2
        (line,) = outcome.err.splitlines()
        assert line.startswith(f"blockyard: {bad}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--window", "4"), ("--kv-memory", "lots"), ("--frontends", "0")),
        *(("--listen", "nowhere"), ("--device", "tpu"), ("--load-format", "gguf")),
        *(("--gpu-memory-utilization", "0"), ("--gpu-memory-utilization", "1.5")),
    ],
)
def test_bad_serve_settings(flag: str, value: str, run: Run) -> None:
    outcome = run("serve", flag, value)
    assert outcome.exit_code == 2
    assert flag in outcome.err

"""Options of `blockyard generate`, `chat` and batch lines, and how several choices are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockyard.cli.tests.conftest import Run
from blockyard.client.tests.scripted_server import ScriptedServer, scripted_server
from blockyard.v1 import generate_pb2 as pb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "--samples"),
        (["--samples", "many"], "--samples"),
        (["--beam-width", "0"], "--beam-width"),
        (["--num-choices", "2"], "--num-choices goes with --beam-width"),
        (["--length-penalty", "1"], "--length-penalty goes with --beam-width"),
        (["--early-stopping", "never"], "--early-stopping goes with --beam-width"),
        (["--beam-width", "2", "--early-stopping", "soon"], "--early-stopping"),
        (["--logprobs", "-1"], "--logprobs"),
        (["--stop-token-id", "-1"], "--stop-token-id"),
        (["--stop-token-id", "4294967296"], "--stop-token-id"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "1e300"], "--timeout"),
        (["--raw", "--system", "x"], "--system goes with a chat"),
    ],
)
def test_bad_options(arguments: list[str], message: str, run: Run) -> None:
    outcome = run("generate", "hi", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err


def test_every_option_reaches_the_wire(run: Run, server: ScriptedServer) -> None:
    shared = ["--ignore-eos", "--stop-token-id", "5", "--stop-token-id", "6", "--cache-salt", "s"]
    run("generate", "hi", "--address", server.address, *shared, "-n", "2", "--logprobs", "0")
    beam = ["--beam-width", "4", "--num-choices", "2", "--length-penalty", "0"]
    beam += ["--early-stopping", "at_width", "--no-cache", "--system", "Be brief."]
    run("generate", "hi", "--address", server.address, *beam)
    run("generate", "hi", "--address", server.address)
    samples, beams, plain = server.requests
    assert (samples.num_samples, samples.HasField("logprobs")) == (2, True)
    assert (samples.stop.ignore_eos, list(samples.stop.token_ids)) == (True, [5, 6])
    assert samples.cache == pb.PrefixCache(salt=b"s")
    assert beams.beam == pb.BeamSearch(
        width=4, num_choices=2, length_penalty=0, early_stopping=pb.EARLY_STOPPING_AT_WIDTH
    )
    assert beams.cache == pb.PrefixCache(off=True)
    assert [(m.role, m.content) for m in beams.chat.messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]
    assert [field.name for field, _ in plain.ListFields()] == ["chat"]


def test_one_choice_is_streamed_and_several_have_headers(run: Run, server: ScriptedServer) -> None:
    generate = ["generate", "hi", "--address", server.address]
    for one in (["-n", "1"], ["--beam-width", "3"]):
        assert run(*generate, *one).out == "one two\n"
    outcome = run(*generate, "-n", "2")
    assert outcome.out == (
        "--- choice 1 of 2: length ---\nHI\n--- choice 2 of 2: length ---\nHI'\n"
    )
    outcome = run(*generate, "--beam-width", "3", "--num-choices", "2")
    assert "--- choice 2 of 2: length, score -0.5000 ---\nHI'\n" in outcome.out


def test_logprobs_are_a_table_below_the_text(run: Run, server: ScriptedServer) -> None:
    outcome = run("generate", "hi", "--address", server.address, "--logprobs", "1", "-n", "2")
    header, text, *table = outcome.out.splitlines()[:5]
    assert (header, text) == ("--- choice 1 of 2: length ---", "HI")
    assert [line.split() for line in table] == [
        ["token", "logprob", "likeliest"],
        ["10", "-0.5000", "20", "-0.2500"],
        ["11", "-1.0000"],
    ]


def test_timeouts_hold_for_answers(run: Run, server: ScriptedServer) -> None:
    outcome = run("generate", "--raw", "slow", "--address", server.address, "--timeout", "0.2")
    assert outcome.exit_code == 1
    assert "DEADLINE_EXCEEDED" in outcome.err


def test_a_system_message_needs_a_template(run: Run) -> None:
    with scripted_server(has_chat_template=False) as server:
        outcome = run("generate", "hi", "--address", server.address, "--system", "x")
    assert outcome.exit_code == 1
    assert "has no chat template, which --system needs" in outcome.err


def test_chat_takes_the_shared_options(
    run: Run, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["hi"])

    def read(_prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    options = ["--timeout", "5", "--ignore-eos", "--no-cache"]
    assert run("chat", "--address", server.address, *options).exit_code == 0
    (request,) = server.requests
    assert (request.stop.ignore_eos, request.cache.off) == (True, True)


def run_lines(
    run: Run, server: ScriptedServer, tmp_path: Path, lines: list[dict[str, Any]], *flags: str
) -> list[dict[str, Any]]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--concurrency", "1", *flags)
    outcome = run("generate", "--file", str(source), "--address", server.address, *flags)
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_batch_lines_take_the_same_options(
    run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "num_samples": 2, "logprobs": 1, "cache_salt": "s", "ignore_eos": True},
        {"prompt": "b", "beam": {"width": 4, "early_stopping": "never"}, "system": "Mine."},
        {"prompt": "c", "stop_token_ids": [5], "cache_off": True, "timeout": 5},
    ]
    two, beam, plain = run_lines(run, server, tmp_path, lines, "--system", "Ours.")
    assert [choice["text"] for choice in two["choices"]] == ["OURS. A", "OURS. A'"]
    assert two["choices"][1]["logprobs"] == [
        {"logprob": -0.5, "candidates": [[20, -0.25]]},
        {"logprob": -1.0, "candidates": []},
    ]
    assert two["usage"]["block_seconds"] == 0.5
    assert (beam["text"], beam["score"]) == ("MINE. B", 0.0)
    assert (plain["text"], plain["token_ids"]) == ("OURS. C", [10, 11])
    assert not {"choices", "logprobs", "score"} & plain.keys()
    first, second, third = server.requests
    assert (first.num_samples, first.cache.salt, first.stop.ignore_eos) == (2, b"s", True)
    assert second.beam.early_stopping == pb.EARLY_STOPPING_NEVER
    assert (list(third.stop.token_ids), third.cache.off) == ([5], True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": 1e300}, "timeout must be"),
        ({"system": 5}, "messages: "),
        ({"beam": 4}, "beam: "),
        ({"num_samples": "two"}, "num_samples: "),
        ({"messages": [], "prompt": None, "system": "x"}, "system goes with a prompt"),
    ],
)
def test_bad_fields_of_a_line_are_named(
    fields: dict[str, Any], message: str, run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    (result,) = run_lines(run, server, tmp_path, [{"prompt": "a", **fields}])
    assert result["error"]["code"] == "INVALID_ARGUMENT"
    assert message in result["error"]["message"]
    assert not server.requests


def test_a_lines_own_timeout_holds(run: Run, server: ScriptedServer, tmp_path: Path) -> None:
    lines = [{"prompt": "slow", "timeout": 0.2}]
    (result,) = run_lines(run, server, tmp_path, lines, "--raw")
    assert result["error"]["code"] == "DEADLINE_EXCEEDED"

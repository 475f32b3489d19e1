from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import blockyard
from blockyard.client import (
    AsyncClient,
    BlockyardError,
    Choice,
    Chunk,
    Client,
    TokenLogprob,
    Usage,
)
from blockyard.client.tests.scripted_server import ScriptedServer
from blockyard.v1 import generate_pb2 as pb

USAGE = Usage(4, 3, 2, 77, 1, 0.5, 5, 6, 7, 8)
CHUNKS = [
    Chunk("one ", (10,), 0, None, None, None, "r1", (), 0.0),
    Chunk("two", (11, 12), 0, "stop", ".", USAGE, "r1", (), 0.0),
]
LOGPROBS = (TokenLogprob(-0.5, ((20, -0.25),)), TokenLogprob(-1, ()))


def test_stream(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        assert list(client.generate("hi")) == CHUNKS


async def test_stream_async(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        assert [chunk async for chunk in client.generate("hi")] == CHUNKS


def test_stream_of_choices(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        last = list(client.generate("hi", num_samples=3, logprobs=1))[-1]
    assert (last.choice_index, last.token_ids, last.logprobs) == (2, (11, 12), LOGPROBS)


def test_complete_with_choices(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        completion = client.complete("hi", beam={"width": 4, "num_choices": 2}, logprobs=0)
    first, second = completion.choices
    assert second == Choice(1, "HI'", (10, 11), "length", None, LOGPROBS, -0.5)
    assert (completion.text, completion.token_ids) == (first.text, first.token_ids)
    assert (completion.finish_reason, completion.stopped_by) == ("length", None)


def test_complete_and_model(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        completion = client.complete(messages=[{"role": "user", "content": "hi"}])
        assert (completion.text, completion.finish_reason) == ("HI", "length")
        assert (completion.token_ids, completion.usage) == ((10, 11), USAGE)
        model = client.model()
        assert (model.name, model.max_model_len, model.eos_token_ids) == ("scripted", 64, (2, 3))
        assert (model.max_branches, model.device) == (16, "scripted device")


async def test_complete_and_model_async(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        assert (await client.complete("hi")).text == "HI"
        assert (await client.model()).has_chat_template


def test_every_option_reaches_the_wire(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        client.complete(
            token_ids=[1, 2],
            max_tokens=5,
            temperature=0.0,
            top_k=0,
            top_p=0.5,
            min_p=0.25,
            seed=0,
            stop=["a", "b"],
            stop_token_ids=[9],
            ignore_eos=True,
            request_id="mine",
            skip_text=True,
            num_samples=3,
            logprobs=0,
            cache_salt="café",
        )
        client.complete(
            "beams",
            beam={
                "width": 4,
                "num_choices": 2,
                "length_penalty": 0.0,
                "early_stopping": "never",
            },
            cache_off=True,
        )
        client.complete("plain", stop="end")
    full, beams, plain = server.requests
    assert list(full.token_ids.ids) == [1, 2]
    # Zero is a value, not "unset".
    present = {field.name: value for field, value in full.sampling.ListFields()}
    assert present == {"temperature": 0.0, "top_k": 0, "top_p": 0.5, "min_p": 0.25, "seed": 0}
    assert (full.stop.max_tokens, list(full.stop.strings)) == (5, ["a", "b"])
    assert (list(full.stop.token_ids), full.stop.ignore_eos) == ([9], True)
    assert (full.request_id, full.skip_text) == ("mine", True)
    assert (full.num_samples, full.HasField("logprobs")) == (3, True)
    assert full.cache == pb.PrefixCache(salt="café".encode())
    assert beams.beam.HasField("length_penalty")
    assert beams.beam == pb.BeamSearch(
        width=4, num_choices=2, length_penalty=0, early_stopping=pb.EARLY_STOPPING_NEVER
    )
    assert beams.cache == pb.PrefixCache(off=True)
    assert (plain.prompt, list(plain.stop.strings)) == ("plain", ["end"])
    assert not plain.stop.HasField("max_tokens")
    assert [field.name for field, _ in plain.ListFields()] == ["prompt", "stop"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "max_token": 5}, "unknown option 'max_token'"),
        ({"prompt": 5}, "bad argument|expected"),
        ({"token_ids": [-1]}, "range|negative"),
        ({"token_ids": 7}, "iterable"),
        ({"messages": ["hello"]}, "mapping"),
        ({"messages": [{"rolle": "user"}]}, "rolle"),
        ({"prompt": "a", "top_k": -1}, "range|negative"),
        ({"prompt": "a", "stop": 3}, "stop: .*iterable"),
        ({"prompt": "a", "num_samples": -1}, "num_samples: .*(range|negative)"),
        ({"prompt": "a", "logprobs": "all"}, "logprobs: "),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt: "),
        ({"prompt": "a", "beam": 4}, "beam: .*iterable"),
        ({"prompt": "a", "beam": {"breadth": 4}}, "beam: .*breadth"),
        ({"prompt": "a", "beam": {"width": -1}}, "beam: .*(range|negative)"),
        ({"prompt": "a", "beam": {"width": 4, "early_stopping": "soon"}}, "early_stopping must be"),
        ({"prompt": "\ud800"}, "prompt: .*utf-8"),
        ({"prompt": "a", "stop": ["b", "\ud800"]}, "stop: .*utf-8"),
    ],
)
def test_bad_arguments_do_not_reach_the_server(
    arguments: dict[str, Any], message: str, server: ScriptedServer
) -> None:
    with Client(server.address) as client, pytest.raises(BlockyardError, match=message) as caught:
        client.generate(**arguments)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not server.requests


def test_errors_of_the_server(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        with pytest.raises(BlockyardError) as caught:
            list(client.generate("fail"))
        with pytest.raises(BlockyardError):
            client.complete("fail")
        with pytest.raises(BlockyardError, match="DEADLINE_EXCEEDED"):
            client.complete("slow", timeout=0.1)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.message == "sampling.top_p: out of range"
    client = Client(server.address, timeout=0.1)
    with client, pytest.raises(BlockyardError, match="DEADLINE_EXCEEDED"):
        list(client.generate("endless"))


async def test_errors_of_the_server_async(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(BlockyardError, match="INVALID_ARGUMENT"):
            async for _ in client.generate("fail"):
                pass
        with pytest.raises(BlockyardError, match="DEADLINE_EXCEEDED"):
            await client.complete("slow", timeout=0.1)


def test_a_large_answer_comes_whole(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        # More than gRPC takes by default; the server's own limit on requests is as low.
        completion = client.complete("a" * 3_000_000, num_samples=2)
    assert [len(choice.text) for choice in completion.choices] == [3_000_000, 3_000_001]


def test_no_proxy_stands_between_parts_of_one_machine(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(server.address) as client:
        assert client.model().name == "scripted"


def test_no_server() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(BlockyardError, match="UNAVAILABLE"):
        client.model()


def test_closing_the_iterator_cancels(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        chunks = client.generate("endless")
        assert next(chunks).text == "one "
        assert not server.cancelled.is_set()
        chunks.close()
        assert server.cancelled.wait(5)


async def test_closing_the_async_iterator_cancels(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        chunks = client.generate("endless")
        assert (await anext(chunks)).text == "one "
        await chunks.aclose()
        assert server.cancelled.wait(5)


def test_the_package_stays_light() -> None:
    code = "import sys, blockyard; assert 'grpc' not in sys.modules; blockyard.Client"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert blockyard.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="Nothing"):
        _ = blockyard.Nothing

"""What clients say, and their tokens, are in no log, span, metric or message."""

from __future__ import annotations

import asyncio
import logging
import socket
import urllib.request
from pathlib import Path
from typing import Any, Final, Never

import grpc
import grpc.aio
import pytest

from blockyard.client import AsyncClient, BlockyardError
from blockyard.common import logs
from blockyard.common.settings import CRASHED, ServiceSettings, run_service, settings_config
from blockyard.v1 import generate_pb2 as pb
from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.public_client import PublicClient
from integration_tests.trace_collector import TraceCollector
from scheduler_svc.frontend.tests.conftest import serving
from scheduler_svc.frontend.tokenizer import PromptTokenizer

MARK: Final = "xyzzymark"
TOKEN: Final = "plugh-0123456789abcdef"
WRONG_TOKEN: Final = "plugh-fedcba9876543210"
SECRETS: Final = (MARK, TOKEN, WRONG_TOKEN, TOKEN[6:], WRONG_TOKEN[6:])


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"), ("traceparent", f"00-{'5' * 32}-{'6' * 16}-01"))


def requests() -> list[pb.GenerateRequest]:
    """Good ones, and bad ones of all kinds, with the mark wherever text may be."""
    words = f"a {MARK} b"
    stop = pb.StopConditions(max_tokens=4, strings=[MARK], ignore_eos=True)
    chat = [pb.ChatMessage(role="user", content=words)]
    return [
        pb.GenerateRequest(prompt=words, stop=stop, cache=pb.PrefixCache(salt=MARK.encode())),
        pb.GenerateRequest(chat=pb.ChatMessages(messages=chat), stop=stop),
        pb.GenerateRequest(prompt=words, beam=pb.BeamSearch(width=2), stop=stop),
        pb.GenerateRequest(prompt=words, num_samples=9999),
        pb.GenerateRequest(prompt=words * 3000),
        pb.GenerateRequest(prompt=words * 40000),
        pb.GenerateRequest(prompt=words, sampling=pb.SamplingParams(top_p=7)),
        pb.GenerateRequest(prompt=words, stop=stop, skip_text=True),
        pb.GenerateRequest(prompt=words, cache=pb.PrefixCache(salt=MARK.encode() * 99)),
        pb.GenerateRequest(prompt=words, request_id=f"\n{MARK}"),
    ]


def check(where: str, text: str) -> None:
    found = [secret for secret in SECRETS if secret in text]
    assert not found, f"{where} holds {found}"


async def message_of(call: Any) -> str:
    """The message of a call's error; empty if it is answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return f"{error.details()} {error.trailing_metadata()}"
    return ""


async def test_requests_of_all_kinds_through_real_processes(tmp_path: Path) -> None:
    collector = TraceCollector(f"unix:{tmp_path}/collector.sock")
    await collector.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN}\n")
    common: tuple[object, ...] = ("--otlp-endpoint", collector.address, "--trace-sample-ratio", 1)
    common += ("--log-level", "DEBUG")
    processes = Processes(
        tmp_path,
        executor_flags=("--vocab-size", 400, "--max-model-len", 1000),
        engine_flags=("--metrics-address", metrics, *common),
    )
    model = fake_model_dir(tmp_path / "model", 400)
    flags = ("--auth-tokens", tokens, "--max-request-bytes", 100_000, *common)
    frontend, address = processes.add_frontend(model, *flags, "--lame-duck-s", 0)
    async with running(processes), PublicClient(address) as client, asyncio.timeout(60):
        await frontend.start()
        await client.serving()
        messages = []
        for request in requests():
            for token in (TOKEN, WRONG_TOKEN):
                call = client.stub.GenerateUnary(request, metadata=bearer(token))
                messages.append(await message_of(call))
            stream = client.stub.Generate(request, metadata=bearer(TOKEN))
            messages.append(await message_of(stream.read()))
            stream.cancel()
        late = client.stub.GenerateUnary(requests()[0], metadata=bearer(TOKEN), timeout=1e-3)
        messages.append(await message_of(late))
        tokens.write_text(f"alice {TOKEN}\nmallory {WRONG_TOKEN} {MARK}\n")
        await asyncio.sleep(1.1)  # until the file is looked at again
        await message_of(client.stub.GetModel(pb.GetModelRequest(), metadata=bearer(TOKEN)))
        scrape = await asyncio.to_thread(_scrape, metrics)
        assert "request_success" in scrape
        await processes.executor.kill()
        assert await frontend.stop() == 0
        assert await processes.engine.stop() == 0
        log = "".join(p.log() for p in (frontend, processes.engine, processes.executor))
    await collector.stop()
    names = {span.name for span in collector.spans}
    assert {"llm_request", "decode", "engine.step"} <= names
    assert "UNAUTHENTICATED" in log
    assert "client=alice" in log
    assert f"{tokens}, line 2: must be a client's name and its token" in log
    check("a log", log)
    check("a span", str(collector.spans))
    check("a metric", scrape)
    check("a message", "".join(messages))


def _scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.parametrize("has_contents", [False, True])
async def test_a_bug_in_the_front_end(
    has_contents: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its exception quotes the prompt, which is logged only if that is asked for."""

    def encode(_: PromptTokenizer, text: str) -> Never:
        try:
            raise ValueError(f"cannot encode {text}")
        except ValueError as error:
            raise KeyError(text) from error

    monkeypatch.setattr(PromptTokenizer, "_encode_prompt", encode)
    logs.configure("frontend", has_contents=has_contents)
    collector = TraceCollector(f"unix:{tmp_path}/collector.sock")
    await collector.start()
    traced = serving(tmp_path, otlp_endpoint=collector.address, trace_sample_ratio=1.0)
    async with traced as (frontend, _):
        async with AsyncClient(f"127.0.0.1:{frontend.port}") as client:
            with pytest.raises(BlockyardError) as caught:
                await client.complete(f"a {MARK}")
        await collector.until(lambda: bool(collector.named("llm_request")))
    await collector.stop()
    assert caught.value.reason == "INTERNAL_ERROR"
    check("a message", str(caught.value))
    check("a span", str(collector.spans))
    log = capfd.readouterr().err
    assert "builtins.KeyError" in log or has_contents
    assert "in encode" in log
    assert (MARK in log) == has_contents


@pytest.mark.parametrize("flags", [[], ["--log-contents"]])
def test_a_process_that_crashes(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    class Settings(ServiceSettings):
        model_config = settings_config("test", "test")

    def serve(_: Settings) -> int:
        raise ExceptionGroup(MARK, [ValueError(MARK), RuntimeError(MARK)])

    assert run_service("test", Settings, flags, serve, ()) == CRASHED
    log = capfd.readouterr().err
    assert "crashed" in log
    assert "ValueError" in log
    assert "RuntimeError" in log
    assert (MARK in log) == bool(flags)


async def test_a_task_that_fails_unseen(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("test")

    async def fail() -> None:
        raise ValueError(MARK)

    task = asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    logging.getLogger("test").info("after it")
    log = capfd.readouterr().err
    assert "Task exception was never retrieved" in log
    assert "builtins.ValueError" in log
    check("a log", log)

"""Every kind of bad request, to a whole system that is serving others."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest

from blockyard.v1 import generate_pb2 as pb
from integration_tests.engine_client import EngineClient
from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.public_client import PublicClient
from integration_tests.reference import reference_output

VOCAB_SIZE: Final = 400
NUM_POOL_TOKENS: Final = 8 * 99
TIMEOUT_S: Final = 60.0
NUM_WANTED: Final = 80

Sampling, Stop = pb.SamplingParams, pb.StopConditions


def chat(role: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=role, content="x")])


def token_ids(*ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


BAD: Final[list[tuple[dict[str, Any], str]]] = [
    ({}, "one of prompt, token_ids, chat must be set"),
    ({"prompt": ""}, "prompt is empty"),
    ({"token_ids": token_ids()}, "token_ids.ids is empty"),
    ({"token_ids": token_ids(*[1] * (NUM_POOL_TOKENS + 1))}, "the prompt has 793 tokens"),
    ({"prompt": "a b " * 200_000}, "characters are more than the 793 tokens"),
    ({"prompt": "a", "stop": Stop(max_tokens=0)}, "stop.max_tokens must be at least 1"),
    ({"prompt": "a", "stop": Stop(max_tokens=2**32 - 1)}, "more than the 793 that fit"),
    ({"prompt": "a", "sampling": Sampling(temperature=-1)}, "sampling.temperature"),
    ({"prompt": "a", "sampling": Sampling(temperature=math.nan)}, "sampling.temperature"),
    ({"prompt": "a", "sampling": Sampling(top_p=0)}, "sampling.top_p"),
    ({"prompt": "a", "sampling": Sampling(top_p=1.5)}, "sampling.top_p"),
    ({"prompt": "a", "sampling": Sampling(top_p=math.nan)}, "sampling.top_p"),
    ({"token_ids": token_ids(VOCAB_SIZE)}, "token_ids.ids holds 400; the vocabulary has 400 ids"),
    ({"prompt": "a", "stop": Stop(token_ids=[VOCAB_SIZE])}, "stop.token_ids holds 400"),
    ({"chat": chat("robot")}, "chat.messages[0].role must be one of"),
    ({"chat": pb.ChatMessages()}, "chat.messages is empty"),
    ({"chat": chat("user")}, "chat template: roles must alternate"),
]
NOT_UTF8: Final = b"\x0a\x02\xff\xfe"


@pytest.mark.timeout(70)
async def test_each_has_a_clear_status_and_costs_nobody_anything(tmp_path: Path) -> None:
    processes = Processes(
        tmp_path,
        executor_flags=(
            *("--num-device-blocks", NUM_POOL_TOKENS // 8 + 1, "--block-size", 8),
            *("--max-rows", 16, "--vocab-size", VOCAB_SIZE, "--step-ms", 50),
        ),
        engine_flags=("--strict",),
    )
    model = fake_model_dir(tmp_path / "model", VOCAB_SIZE)
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    frontend, address = processes.add_frontend(model)
    async with (
        asyncio.timeout(TIMEOUT_S),
        running(processes),
        PublicClient(address) as public,
        EngineClient(processes.engine_address) as engine,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await frontend.start()
        await public.serving()
        others = [asyncio.create_task(public.generate([n, 7], NUM_WANTED)) for n in range(8)]
        await engine.snapshot_when(lambda shot: shot.num_running == len(others))
        for fields, message in BAD:
            request = pb.GenerateRequest(**fields)
            for call in (public.stub.GenerateUnary(request), public.stub.Generate(request).read()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, fields
                assert message in str(caught.value.details())
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        send = channel.unary_unary("/blockyard.v1.GenerateService/GenerateUnary")
        with pytest.raises(grpc.aio.AioRpcError, match="prompt is not valid UTF-8") as caught:
            await send(NOT_UTF8)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not any(other.done() for other in others), "nobody was left to be disturbed"
        for number, other in enumerate(others):
            answer = await other
            assert answer.token_ids == reference_output([number, 7], NUM_WANTED, VOCAB_SIZE)
        shot = await engine.idle()
        assert shot.counters.num_finished == len(others)

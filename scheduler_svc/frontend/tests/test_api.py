"""The public service end to end, with a scripted engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest

from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.fanout import Stop
from scheduler_svc.frontend.tests.calls import expect_status, first_of, messages_of, until
from scheduler_svc.frontend.tests.conftest import MAX_BRANCHES, MAX_MODEL_LEN, Service, engine_state
from scheduler_svc.frontend.tests.fake_engine import finished
from scheduler_svc.frontend.tests.models import BOS_ID, END_ID
from scheduler_svc.frontend.tokenizer import PromptTokenizer


def prompt_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="The quick", **fields)


def letters(service: Service, text: str) -> list[int]:
    """One token per ASCII character."""
    vocabulary = service.tokenizer.get_vocab()
    return [vocabulary[character] for character in text]


async def test_streams_text_and_ends_with_usage(service: Service) -> None:
    sampling = pb.SamplingParams(seed=7)
    call = service.stub.Generate(prompt_request(request_id="r1", sampling=sampling))
    submit, prompt = await service.engine.next_submit()
    assert prompt == service.tokenizer.encode("The quick").ids
    assert submit.seed == 7
    assert list(submit.stop_token_ids) == [END_ID]
    assert submit.deadline_unix_ns == 0
    output = service.tokenizer.encode(" brown 🙂").ids
    await service.engine.send_tokens(submit.request_id, output[:1])
    first = await first_of(call)
    assert first.token_ids == output[:1]
    await service.engine.send_tokens(
        submit.request_id, [*output[1:], END_ID], finished("STOP", 5, stop_token_id=END_ID)
    )
    rest = await messages_of(call)
    messages = [first, *rest]
    assert "".join(m.text for m in messages) == " brown 🙂"
    assert [i for m in messages for i in m.token_ids] == [*output, END_ID]
    assert {m.request_id for m in messages} == {"r1"}
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.stop_reason.token_id == END_ID
    assert last.usage == pb.Usage(
        prompt_tokens=len(prompt), output_tokens=len(output) + 1, cached_tokens=5, seed=7
    )


async def test_unary_gives_the_same_at_once(service: Service) -> None:
    call = service.stub.GenerateUnary(prompt_request(stop=pb.StopConditions(max_tokens=9)))
    submit, _ = await service.engine.next_submit()
    assert submit.max_tokens == 9
    output = service.tokenizer.encode("fox and").ids
    for token_id in output[:-1]:
        await service.engine.send_tokens(submit.request_id, [token_id])
    await service.engine.send_tokens(submit.request_id, output[-1:], finished("LENGTH"))
    response = await call
    (choice,) = response.choices
    assert (choice.text, list(choice.token_ids)) == ("fox and", output)
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert not choice.HasField("stop_reason")
    assert response.usage.output_tokens == len(output)
    assert response.usage.seed == submit.seed
    assert response.request_id


async def test_chat_is_rendered(service: Service) -> None:
    messages = [pb.ChatMessage(role="user", content="Hello")]
    call = service.stub.Generate(pb.GenerateRequest(chat=pb.ChatMessages(messages=messages)))
    _, prompt = await service.engine.next_submit()
    text = "<|bos|><|start|>user\nHello<|end|>\n<|start|>assistant\n"
    assert prompt == service.tokenizer.encode(text).ids
    assert prompt.count(BOS_ID) == 1
    call.cancel()


async def test_token_ids_pass_unchanged_and_skip_text_sends_ids_alone(service: Service) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[9, 0, 9]), skip_text=True)
    call = service.stub.Generate(request)
    submit, prompt = await service.engine.next_submit()
    assert prompt == [9, 0, 9]
    await service.engine.send_tokens(submit.request_id, [50, 51], finished("LENGTH"))
    (message,) = await messages_of(call)
    assert (message.text, list(message.token_ids)) == ("", [50, 51])


async def test_seeds_are_drawn_and_differ(service: Service) -> None:
    calls = [service.stub.Generate(prompt_request()) for _ in range(2)]
    seeds = {(await service.engine.next_submit())[0].seed for _ in calls}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    for call in calls:
        call.cancel()


async def test_ignored_eos_and_own_stop_ids(service: Service) -> None:
    stop = pb.StopConditions(token_ids=[40, 41, 40], ignore_eos=True)
    call = service.stub.Generate(prompt_request(stop=stop))
    submit, _ = await service.engine.next_submit()
    assert list(submit.stop_token_ids) == [40, 41]
    ids = service.tokenizer.encode("ab").ids
    await service.engine.send_tokens(
        submit.request_id, [*ids, 41], finished("STOP", stop_token_id=41)
    )
    (message,) = await messages_of(call)
    assert (message.text, list(message.token_ids)) == ("ab", [*ids, 41])


async def test_stop_string_across_tokens_cuts_text_ids_and_usage(service: Service) -> None:
    call = service.stub.Generate(prompt_request(stop=pb.StopConditions(strings=["D!", "never"])))
    submit, _ = await service.engine.next_submit()
    output = letters(service, "abED!xyz")
    await service.engine.send_tokens(submit.request_id, output)
    messages = [await first_of(call)]
    assert messages[0].finish_reason == pb.FINISH_REASON_STOP
    assert await service.engine.next_stop() == Stop(submit.request_id, 5)
    # The engine may have produced more meanwhile.
    await service.engine.send_tokens(submit.request_id, [60], finished("STOP", 3))
    messages += await messages_of(call)
    assert "".join(m.text for m in messages) == "abE"
    assert [i for m in messages for i in m.token_ids] == output[:5]
    assert messages[0].stop_reason.string == "D!"
    usage = messages[-1].usage
    assert (usage.output_tokens, usage.cached_tokens) == (5, 3)


async def test_stop_string_does_not_wait_for_ever_for_the_engine(service: Service) -> None:
    call = service.stub.GenerateUnary(prompt_request(stop=pb.StopConditions(strings=["b"])))
    submit, _ = await service.engine.next_submit()
    output = letters(service, "ab")
    await service.engine.send_tokens(submit.request_id, output)
    response = await asyncio.wait_for(call, 5)
    assert response.choices[0].text == "a"
    assert response.usage.output_tokens == 2


async def test_cancel_aborts_at_the_engine(service: Service) -> None:
    call = service.stub.Generate(prompt_request())
    submit, _ = await service.engine.next_submit()
    await service.engine.send_tokens(submit.request_id, [50])
    await first_of(call)
    begin = time.monotonic()
    call.cancel()
    assert await service.engine.next_stop() == Stop(submit.request_id)
    assert time.monotonic() - begin < 2


async def test_deadline_reaches_the_engine_and_aborts(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = service.stub.Generate(prompt_request(), timeout=0.3)
    submit, _ = await service.engine.next_submit()
    assert 0 < submit.deadline_unix_ns - time.time_ns() < 0.31e9
    await expect_status(messages_of(call), grpc.StatusCode.DEADLINE_EXCEEDED, "")
    assert await service.engine.next_stop() == Stop(submit.request_id)
    await until(lambda: any(r.getMessage() == "request" for r in caplog.records))
    (record,) = [r for r in caplog.records if r.getMessage() == "request"]
    assert vars(record)["fields"]["status"] == "DEADLINE_EXCEEDED"


async def test_rejection_is_sent_before_any_header(service: Service) -> None:
    call = service.stub.Generate(prompt_request())
    submit, _ = await service.engine.next_submit()
    rejection = engine_pb2.Rejection(
        request_id=submit.request_id,
        message="the queue is full",
        reason="QUEUE_FULL",
        subject="waiting requests",
        retry_delay_ns=2_500_000_000,
    )
    await service.engine.send(engine_pb2.OutputBatch(rejections=[rejection]))
    await expect_status(messages_of(call), grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    assert not list(await call.initial_metadata())
    await asyncio.sleep(0.05)
    assert service.engine.stops.empty()


async def test_retry_policy_gets_past_unavailable(service: Service) -> None:
    """Trailers-Only in the eyes of a real client: it retries by itself."""
    policy = (
        '{"methodConfig":[{"name":[{}],"retryPolicy":{"maxAttempts":3,"initialBackoff":"0.05s",'
        '"maxBackoff":"0.1s","backoffMultiplier":1,"retryableStatusCodes":["UNAVAILABLE"]}}]}'
    )
    options = [("grpc.service_config", policy)]
    address = f"127.0.0.1:{service.frontend.port}"
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = type(service.stub)(channel).Generate(prompt_request())
        submit, _ = await service.engine.next_submit()
        refusal = engine_pb2.Rejection(
            request_id=submit.request_id, reason="NOT_READY", message="later"
        )
        await service.engine.send(engine_pb2.OutputBatch(rejections=[refusal]))
        submit, _ = await service.engine.next_submit()
        await service.engine.send_tokens(submit.request_id, [50], finished("LENGTH"))
        assert len(await messages_of(call)) == 1


async def test_failed_request_is_internal_and_alone(service: Service) -> None:
    calls = [service.stub.GenerateUnary(prompt_request()) for _ in range(2)]
    keys = [(await service.engine.next_submit())[0].request_id for _ in calls]
    error = finished("ERROR")
    error.error_message = "logits were not finite"
    await service.engine.send_tokens(keys[0], [50], error)
    await service.engine.send_tokens(keys[1], [50], finished("LENGTH"))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failures = [o for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
    assert [f.code() for f in failures] == [grpc.StatusCode.INTERNAL]
    assert failures[0].details() == "logits were not finite"


async def test_slow_reader_fails_alone(service: Service) -> None:
    # A small window, so that the transport does not buffer for the reader.
    options = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
    address = f"127.0.0.1:{service.frontend.port}"
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        slow = type(service.stub)(channel).Generate(prompt_request())
        slow_key = (await service.engine.next_submit())[0].request_id
        fast = service.stub.Generate(prompt_request())
        fast_key = (await service.engine.next_submit())[0].request_id
        await service.engine.send_tokens(fast_key, [50])
        assert (await first_of(fast)).token_ids == [50]
        stop = asyncio.create_task(service.engine.next_stop())
        while not stop.done():
            await service.engine.send_tokens(slow_key, [50] * 100)
        assert await stop == Stop(slow_key)
        await expect_status(messages_of(slow), grpc.StatusCode.RESOURCE_EXHAUSTED, "256 tokens")
    await service.engine.send_tokens(fast_key, [51], finished("LENGTH"))
    assert [list(m.token_ids) for m in await messages_of(fast)] == [[51]]


async def test_get_model(service: Service) -> None:
    model = await service.stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.digest, model.max_model_len) == ("tiny", "d1", MAX_MODEL_LEN)
    assert model.has_chat_template
    assert list(model.eos_token_ids) == [END_ID]
    assert model.version
    assert (model.max_branches, model.device) == (MAX_BRANCHES, "a device")


@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
async def test_malformed_bytes_are_invalid_argument(service: Service, method: str) -> None:
    # Field 1 (prompt), 2 bytes that are not UTF-8; and a truncated message.
    for data, text in ((b"\x0a\x02\xff\xfe", "prompt is not"), (b"\x0a\x7f", "GenerateRequest")):
        path = f"/blockyard.v1.GenerateService/{method}"
        # Read as a unary call: the status is all that matters.
        multicallable: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        multicallable = service.channel.unary_unary(path)
        call = multicallable(data)
        await expect_status(call, grpc.StatusCode.INVALID_ARGUMENT, text)


async def test_prompt_must_leave_room_for_output(service: Service) -> None:
    full = pb.TokenIds(ids=[50] * MAX_MODEL_LEN)
    almost = pb.TokenIds(ids=full.ids[1:])
    for request, text in [
        (pb.GenerateRequest(token_ids=full), f"prompt has {MAX_MODEL_LEN} tokens"),
        (
            pb.GenerateRequest(token_ids=almost, stop=pb.StopConditions(max_tokens=2)),
            f"= {MAX_MODEL_LEN + 1}, more than the {MAX_MODEL_LEN} that fit",
        ),
    ]:
        call = service.stub.Generate(request)
        await expect_status(messages_of(call), grpc.StatusCode.INVALID_ARGUMENT, text)
        assert not list(await call.initial_metadata())
    call = service.stub.Generate(
        pb.GenerateRequest(token_ids=almost, stop=pb.StopConditions(max_tokens=1))
    )
    assert len((await service.engine.next_submit())[1]) == MAX_MODEL_LEN - 1
    call.cancel()


async def test_template_errors_name_the_chat(service: Service) -> None:
    messages = [pb.ChatMessage(role="user", content="forbidden")]
    call = service.stub.Generate(pb.GenerateRequest(chat=pb.ChatMessages(messages=messages)))
    await expect_status(
        messages_of(call), grpc.StatusCode.INVALID_ARGUMENT, "chat template: no such content"
    )


async def test_our_own_bug_is_internal_and_says_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(self: PromptTokenizer, text: str) -> list[int]:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(PromptTokenizer, "encode_prompt", fail)
    call = service.stub.GenerateUnary(prompt_request())
    await expect_status(call, grpc.StatusCode.INTERNAL, "internal error of the front end")
    assert any(r.exc_info for r in caplog.records)
    monkeypatch.undo()
    next_call = service.stub.Generate(prompt_request())
    await service.engine.next_submit()
    next_call.cancel()


async def test_chat_needs_a_template(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptTokenizer, "has_chat_template", False)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])
    call = service.stub.GenerateUnary(pb.GenerateRequest(chat=chat))
    await expect_status(call, grpc.StatusCode.INVALID_ARGUMENT, "no chat template")


async def test_not_ready_engine_means_unavailable(service: Service) -> None:
    service.engine.send_state(engine_state(ready=False))
    await until(lambda: not service.frontend.is_ready)
    calls: list[Awaitable[Any]] = [
        messages_of(service.stub.Generate(prompt_request())),
        service.stub.GenerateUnary(prompt_request()),
        service.stub.GetModel(pb.GetModelRequest()),
    ]
    for call in calls:
        await expect_status(call, grpc.StatusCode.UNAVAILABLE, "not ready")


async def test_log_line_has_numbers_and_no_text(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = service.stub.Generate(prompt_request(request_id="r9"))
    submit, _ = await service.engine.next_submit()
    await service.engine.send_tokens(submit.request_id, [50, 51], finished("LENGTH"))
    await messages_of(call)
    await until(lambda: any(r.getMessage() == "request" for r in caplog.records))
    (record,) = [r for r in caplog.records if r.getMessage() == "request"]
    fields = vars(record)["fields"]
    assert fields["request_id"] == "r9"
    assert (fields["status"], fields["finish_reason"]) == ("OK", "LENGTH")
    assert fields["output_tokens"] == 2
    assert 0 <= fields["ttft_ms"] <= fields["duration_ms"]
    assert "quick" not in caplog.text


async def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(*_: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(PromptTokenizer, "encode_prompt", encode)
    monkeypatch.setattr(PromptTokenizer, "encode_chat", encode)
    text = "x" * 1_000_000
    message = pb.ChatMessage(role="user", content=text)
    for request in (
        pb.GenerateRequest(prompt=text),
        pb.GenerateRequest(chat=pb.ChatMessages(messages=[message])),
    ):
        call = service.stub.GenerateUnary(request)
        await expect_status(call, grpc.StatusCode.INVALID_ARGUMENT, "1000000 characters")

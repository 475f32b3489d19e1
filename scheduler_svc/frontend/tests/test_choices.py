"""Samples, beams, log-probabilities and cache options, end to end with a scripted engine."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.fanout import Stop
from scheduler_svc.frontend.tests.calls import expect_status, first_of, messages_of
from scheduler_svc.frontend.tests.conftest import MAX_BRANCHES, Service
from scheduler_svc.frontend.tests.fake_engine import branch_batch, finished, with_logprobs
from scheduler_svc.frontend.tests.models import END_ID


def request_of(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="The quick", **fields)


def beam_request(width: int, **fields: Any) -> pb.GenerateRequest:
    num_choices = fields.pop("num_choices", 0)
    return request_of(beam=pb.BeamSearch(width=width, num_choices=num_choices), **fields)


def ids(service: Service, text: str) -> list[int]:
    """Token ids of some text; each ASCII letter that the tokenizer never merged is one."""
    token_ids: list[int] = service.tokenizer.encode(text).ids
    return token_ids


def texts(messages: list[pb.GenerateResponse]) -> dict[int, str]:
    """Text by choice."""
    found: dict[int, str] = {}
    for message in messages:
        found[message.choice_index] = found.get(message.choice_index, "") + message.text
    return found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 2**32 - 1}, f"num_samples is 4294967295, limit {MAX_BRANCHES}"),
        ({"beam": pb.BeamSearch(width=9)}, f"beam.width must be 1 to {MAX_BRANCHES}: 9"),
        (
            {"beam": pb.BeamSearch(width=2), "sampling": pb.SamplingParams(top_p=0.5)},
            "sampling.top_p must not be set with beam",
        ),
        ({"logprobs": pb.Logprobs(num_candidates=21)}, "logprobs.num_candidates is 21"),
        ({"cache": pb.PrefixCache(salt=b"x" * 65)}, "cache.salt has 65 bytes"),
    ],
)
async def test_bad_parameters_never_reach_the_engine(
    service: Service, fields: dict[str, Any], message: str
) -> None:
    call = service.stub.GenerateUnary(request_of(**fields))
    await expect_status(call, grpc.StatusCode.INVALID_ARGUMENT, message)
    assert service.engine.submits.empty()


async def test_samples_stream_side_by_side_and_end_one_by_one(service: Service) -> None:
    call = service.stub.Generate(request_of(num_samples=3, sampling=pb.SamplingParams(seed=7)))
    submit, prompt = await service.engine.next_submit()
    assert (submit.num_samples, submit.HasField("beam"), submit.seed) == (3, False, 7)
    # Half a character each, so that one choice's bytes must not complete another's.
    smile, flag = ids(service, "🙂"), ids(service, "é")
    engine, key = service.engine, submit.request_id
    await engine.send_branches(key, {0: smile[:-1], 1: flag[:-1], 2: [*ids(service, "x"), END_ID]})
    end = finished("STOP", stop_token_id=END_ID, branch=2, is_last=False, num_preemptions=1)
    await engine.send_branches(key, {}, end)
    await engine.send_branches(
        key, {0: smile[-1:]}, finished("LENGTH", branch=0, is_last=False, num_preemptions=2)
    )
    await engine.send_branches(
        key, {1: flag[-1:]}, finished("LENGTH", 5, branch=1, num_preemptions=4)
    )
    messages = await messages_of(call)
    assert texts(messages) == {0: "🙂", 1: "é", 2: "x"}
    endings = {m.choice_index: m.finish_reason for m in messages if m.finish_reason}
    length, stop = pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP
    assert endings == {2: stop, 0: length, 1: length}
    assert [m.HasField("usage") for m in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage == pb.Usage(
        prompt_tokens=len(prompt),
        output_tokens=len(smile) + len(flag) + 2,
        cached_tokens=5,
        seed=7,
        preemptions=4,
    )


async def test_stop_string_ends_one_sample_only(service: Service) -> None:
    stop = pb.StopConditions(strings=["D!"])
    call = service.stub.Generate(request_of(num_samples=2, stop=stop))
    submit, _ = await service.engine.next_submit()
    assert not submit.stop_strings
    engine, key = service.engine, submit.request_id
    vocabulary = service.tokenizer.get_vocab()
    output = [vocabulary[letter] for letter in "aED!xyz"]
    # "D" ends one choice and "!" begins the other: together they are no match.
    await engine.send_branches(key, {0: output[:3], 1: output})
    assert await engine.next_stop() == Stop(key, 4, branch=1)
    await engine.send_branches(
        key, {0: [vocabulary["b"]], 1: output}, finished("STOP", branch=1, is_last=False)
    )
    await engine.send_branches(key, {0: [vocabulary["c"]]}, finished("LENGTH", branch=0))
    messages = await messages_of(call)
    assert texts(messages) == {0: "aEDbc", 1: "aE"}
    (ended,) = [m for m in messages if m.choice_index == 1 and m.finish_reason]
    assert ended.stop_reason.string == "D!"
    assert messages[-1].usage.output_tokens == 5 + 4
    assert engine.stops.empty()


async def test_unary_has_all_choices_in_order_of_their_index(service: Service) -> None:
    call = service.stub.GenerateUnary(request_of(num_samples=3))
    submit, _ = await service.engine.next_submit()
    engine, key = service.engine, submit.request_id
    outputs = {branch: ids(service, text) for branch, text in ((2, "fox"), (0, "dog"), (1, "the"))}
    await engine.send_branches(key, {branch: output[:1] for branch, output in outputs.items()})
    for branch, output in outputs.items():
        is_last = branch == 1
        end = finished("LENGTH", branch=branch, is_last=is_last)
        await engine.send_branches(key, {branch: output[1:]}, end)
        await asyncio.sleep(0.02)
    response = await call
    assert [(choice.index, choice.text) for choice in response.choices] == [
        (0, "dog"),
        (1, "the"),
        (2, "fox"),
    ]
    assert all(c.finish_reason == pb.FINISH_REASON_LENGTH for c in response.choices)
    assert response.usage.output_tokens == sum(map(len, outputs.values()))


@pytest.mark.parametrize("is_last", [True, False])
async def test_a_failed_sample_fails_its_request(service: Service, *, is_last: bool) -> None:
    call = service.stub.Generate(request_of(num_samples=2))
    submit, _ = await service.engine.next_submit()
    engine, key = service.engine, submit.request_id
    error = finished("ERROR", branch=1, is_last=is_last, error_message="not finite")
    await engine.send_branches(key, {0: [50]}, error)
    await expect_status(messages_of(call), grpc.StatusCode.INTERNAL, "not finite")
    if not is_last:
        assert await engine.next_stop() == Stop(key)
    await asyncio.sleep(0.05)
    assert engine.stops.empty()


async def test_cancelling_aborts_all_samples_at_once(service: Service) -> None:
    call = service.stub.Generate(request_of(num_samples=4))
    submit, _ = await service.engine.next_submit()
    engine, key = service.engine, submit.request_id
    await engine.send_branches(key, {0: [50], 3: [51]}, finished("LENGTH", branch=3, is_last=False))
    await first_of(call)
    call.cancel()
    assert await engine.next_stop() == Stop(key)
    await asyncio.sleep(0.05)
    assert engine.stops.empty()


async def test_beams_stream_what_is_sure_and_end_together_with_scores(service: Service) -> None:
    call = service.stub.Generate(
        beam_request(4, num_choices=2, sampling=pb.SamplingParams(temperature=0))
    )
    submit, _ = await service.engine.next_submit()
    assert submit.beam == engine_pb2.BeamSearch(
        width=4,
        num_returned=2,
        length_penalty=1,
        early_stopping=engine_pb2.EARLY_STOPPING_HEURISTIC,
    )
    assert (submit.num_samples, submit.temperature) == (0, 0)
    best, second = ids(service, "brown fox"), ids(service, "brown dog and")
    engine, key = service.engine, submit.request_id
    await engine.send_branches(key, {0: best[:1]})
    first = await first_of(call)
    assert (first.choice_index, list(first.token_ids)) == (0, best[:1])
    await engine.send_branches(
        key,
        {0: [*best[1:], END_ID], 1: second},
        finished("STOP", stop_token_id=END_ID, score=-0.25, is_last=False, num_preemptions=1),
        finished("LENGTH", branch=1, score=-0.5, num_preemptions=1),
    )
    messages = [first, *await messages_of(call)]
    assert texts(messages) == {0: "brown fox", 1: "brown dog and"}
    endings = {m.choice_index: (m.finish_reason, m.score) for m in messages if m.finish_reason}
    assert endings == {0: (pb.FINISH_REASON_STOP, -0.25), 1: (pb.FINISH_REASON_LENGTH, -0.5)}
    usage = messages[-1].usage
    assert (usage.output_tokens, usage.preemptions) == (len(best) + 1 + len(second), 1)


async def test_stop_strings_of_beams_are_the_engines_to_act_on(service: Service) -> None:
    stop = pb.StopConditions(strings=["D!", "never"])
    call = service.stub.GenerateUnary(beam_request(2, num_choices=2, stop=stop))
    submit, _ = await service.engine.next_submit()
    assert list(submit.stop_strings) == ["D!", "never"]
    engine, key = service.engine, submit.request_id
    vocabulary = service.tokenizer.get_vocab()
    output = [vocabulary[letter] for letter in "aED!"]
    await engine.send_branches(key, {0: output})
    await asyncio.sleep(0.05)
    assert engine.stops.empty()
    await engine.send_branches(
        key,
        {1: [vocabulary["b"], *output]},
        finished("STOP", score=-1, is_last=False),
        finished("STOP", score=-2, branch=1),
    )
    response = await call
    assert [choice.text for choice in response.choices] == ["aE", "baE"]
    assert [choice.stop_reason.string for choice in response.choices] == ["D!", "D!"]
    assert [choice.score for choice in response.choices] == [-1, -2]
    assert engine.stops.empty()


async def test_beams_that_come_at_once_are_no_slow_readers_fault(service: Service) -> None:
    call = service.stub.Generate(beam_request(2, num_choices=2))
    submit, _ = await service.engine.next_submit()
    # More than max_buffered_tokens of the fixture.
    await service.engine.send_branches(
        submit.request_id,
        {0: [50] * 1000, 1: [51] * 1000},
        finished("LENGTH", is_last=False),
        finished("LENGTH", branch=1),
    )
    assert sum(len(m.token_ids) for m in await messages_of(call)) == 2000


async def test_logprobs_are_parallel_to_the_tokens(service: Service) -> None:
    call = service.stub.Generate(request_of(num_samples=2, logprobs=pb.Logprobs(num_candidates=2)))
    submit, _ = await service.engine.next_submit()
    assert submit.num_logprobs == 3
    key = submit.request_id
    batch = branch_batch(
        key,
        {0: [50, 51], 1: [52]},
        finished("LENGTH", branch=0, is_last=False),
        finished("LENGTH", branch=1),
    )
    await service.engine.send(with_logprobs(batch, 2))
    messages = await messages_of(call)
    assert [list(m.token_ids) for m in messages] == [[50, 51], [52]]
    assert [[entry.logprob for entry in m.logprobs] for m in messages] == [[0, -1], [-2]]
    (last,) = messages[1].logprobs
    assert list(last.candidate_token_ids) == [0, 1]
    assert list(last.candidate_logprobs) == [-2, -2.125]


async def test_logprobs_end_where_a_stop_string_cuts_the_tokens(service: Service) -> None:
    stop = pb.StopConditions(strings=["D!"])
    call = service.stub.GenerateUnary(request_of(stop=stop, logprobs=pb.Logprobs()))
    submit, _ = await service.engine.next_submit()
    assert submit.num_logprobs == 1
    vocabulary = service.tokenizer.get_vocab()
    output = [vocabulary[letter] for letter in "aED!xyz"]
    await service.engine.send(with_logprobs(branch_batch(submit.request_id, {0: output}), 0))
    await service.engine.next_stop()
    await service.engine.send_branches(submit.request_id, {}, finished("STOP"))
    (choice,) = (await call).choices
    assert list(choice.token_ids) == output[:4]
    assert [entry.logprob for entry in choice.logprobs] == [0, -1, -2, -3]
    assert not choice.logprobs[0].candidate_token_ids


async def test_cache_options_and_block_usage_pass_through(service: Service) -> None:
    salted, private = (
        service.stub.GenerateUnary(request_of(cache=cache))
        for cache in (pb.PrefixCache(salt=b"\xfftenant"), pb.PrefixCache(off=True))
    )
    blocks = engine_pb2.BlockUsage(
        block_seconds=1.5, num_shared=2, num_copied=3, num_swapped_out=4, num_swapped_in=5
    )
    options = []
    for _ in range(2):
        submit, _ = await service.engine.next_submit()
        options.append((submit.cache_salt, submit.cache_off))
        end = finished("LENGTH", 9, blocks=blocks)
        await service.engine.send_tokens(submit.request_id, [50], end)
    assert sorted(options) == [(b"", True), (b"\xfftenant", False)]
    for call in (salted, private):
        usage = (await call).usage
        assert (usage.cached_tokens, usage.block_seconds, usage.blocks_shared) == (9, 1.5, 2)
        assert (usage.blocks_copied, usage.blocks_swapped_out, usage.blocks_swapped_in) == (3, 4, 5)


async def test_plain_requests_ask_for_nothing_special(service: Service) -> None:
    call = service.stub.Generate(request_of())
    submit, _ = await service.engine.next_submit()
    assert (submit.num_samples, submit.HasField("beam"), submit.num_logprobs) == (1, False, 0)
    assert (submit.cache_salt, submit.cache_off, list(submit.stop_strings)) == (b"", False, [])
    call.cancel()

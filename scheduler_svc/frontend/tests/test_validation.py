from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from blockyard.common.model_dir import SamplingDefaults
from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import RequestError
from scheduler_svc.frontend import validation

VOCAB_SIZE = 50
MAX_BRANCHES = 16
DEFAULTS = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)


def expect_invalid(message: str, function: Any, *arguments: object) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        function(*arguments)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of prompt, token_ids, chat"),
        ({"prompt": ""}, "prompt is empty"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids is empty"),
        ({"token_ids": pb.TokenIds(ids=[0, VOCAB_SIZE])}, "token_ids.ids holds 50; .* 50 ids"),
        ({"token_ids": pb.TokenIds(ids=[2**32 - 1])}, "token_ids.ids holds 4294967295"),
        ({"chat": pb.ChatMessages()}, "chat.messages is empty"),
        (
            {
                "chat": pb.ChatMessages(
                    messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role="User\n" * 100)]
                )
            },
            r"chat.messages\[1\].role must be one of assistant, system, user: 'User",
        ),
        ({"chat": pb.ChatMessages(messages=[pb.ChatMessage(content="x")])}, r"\[0\].role"),
    ],
)
def test_bad_inputs(fields: dict[str, Any], message: str) -> None:
    expect_invalid(message, validation.check_input, pb.GenerateRequest(**fields), VOCAB_SIZE)


def test_good_inputs() -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="system"), pb.ChatMessage(role="user")])
    for request in (
        pb.GenerateRequest(prompt="x"),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, VOCAB_SIZE - 1])),
        pb.GenerateRequest(chat=chat),
    ):
        validation.check_input(request, VOCAB_SIZE)


@pytest.mark.parametrize("temperature", [-0.1, 100.1, math.nan, math.inf, -math.inf])
def test_bad_temperature(temperature: float) -> None:
    params = pb.SamplingParams(temperature=temperature)
    expect_invalid("sampling.temperature", validation.check_sampling, params, DEFAULTS)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_bad_top_p(top_p: float) -> None:
    params = pb.SamplingParams(top_p=top_p)
    expect_invalid("sampling.top_p", validation.check_sampling, params, DEFAULTS)


@pytest.mark.parametrize("min_p", [-0.01, 1.01, math.nan, math.inf])
def test_bad_min_p(min_p: float) -> None:
    params = pb.SamplingParams(min_p=min_p)
    expect_invalid("sampling.min_p", validation.check_sampling, params, DEFAULTS)


def test_defaults_fill_only_what_is_not_set() -> None:
    sampling = validation.check_sampling(pb.SamplingParams(), DEFAULTS)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (
        0.5,
        7,
        0.25,
        0.125,
    )
    zeros = pb.SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, seed=0)
    sampling = validation.check_sampling(zeros, DEFAULTS)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 0, 1)
    assert (sampling.min_p, sampling.seed) == (0, 0)


def test_unset_seed_is_drawn() -> None:
    seeds = {validation.check_sampling(pb.SamplingParams(), DEFAULTS).seed for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds).bit_length() <= validation.SEED_BITS
    # The chance that 50 draws all miss the upper half is 2**-50.
    assert max(seeds).bit_length() == validation.SEED_BITS


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (pb.StopConditions(max_tokens=0), "stop.max_tokens must be at least 1"),
        (pb.StopConditions(strings=["a"] * 17), "stop.strings has 17 entries, limit 16"),
        (pb.StopConditions(strings=["a", ""]), "stop.strings has an empty entry"),
        (pb.StopConditions(token_ids=[VOCAB_SIZE]), "stop.token_ids holds 50"),
        (pb.StopConditions(token_ids=[1] * 257), "stop.token_ids has 257 entries, limit 256"),
    ],
)
def test_bad_stop_conditions(stop: pb.StopConditions, message: str) -> None:
    request = pb.GenerateRequest(stop=stop)
    expect_invalid(message, validation.check_stopping, request, (2,), VOCAB_SIZE)


def test_stop_strings_need_text() -> None:
    request = pb.GenerateRequest(stop=pb.StopConditions(strings=["a"]), skip_text=True)
    expect_invalid("skip_text", validation.check_stopping, request, (2,), VOCAB_SIZE)


def test_stop_token_ids_hold_the_models_unless_ignored() -> None:
    stop = pb.StopConditions(token_ids=[5, 2, 5], strings=["x"], max_tokens=3)
    stopping = validation.check_stopping(pb.GenerateRequest(stop=stop), (2, 3), VOCAB_SIZE)
    assert (stopping.token_ids, stopping.strings, stopping.max_tokens) == ((5, 2, 3), ("x",), 3)
    stop.ignore_eos = True
    stopping = validation.check_stopping(pb.GenerateRequest(stop=stop), (2, 3), VOCAB_SIZE)
    assert stopping.token_ids == (5, 2)


def test_lengths() -> None:
    validation.check_length(99, 0, 100)
    validation.check_length(99, 1, 100)
    expect_invalid("no tokens", validation.check_length, 0, 0, 100)
    expect_invalid("has 100 tokens", validation.check_length, 100, 0, 100)
    expect_invalid(r"99 tokens.* \+ .*\(2\) = 101", validation.check_length, 99, 2, 100)
    expect_invalid("4294967296", validation.check_length, 1, 2**32 - 1, 100)


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb", "\x00", "\u202e"])
def test_bad_request_ids(request_id: str) -> None:
    request = pb.GenerateRequest(request_id=request_id)
    expect_invalid("request_id must be", validation.check_request_id, request)


def test_request_id_is_kept_or_made() -> None:
    assert validation.check_request_id(pb.GenerateRequest(request_id="é" * 128)) == "é" * 128
    made = {validation.check_request_id(pb.GenerateRequest()) for _ in range(2)}
    assert len(made) == 2
    assert all(made)


def beam(width: int = 4, **fields: Any) -> dict[str, Any]:
    return {"beam": pb.BeamSearch(width=width, **fields)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 17}, "num_samples is 17, limit 16"),
        ({"num_samples": 2**32 - 1}, "num_samples is 4294967295, limit 16"),
        ({"num_samples": 2, **beam()}, "num_samples and beam exclude each other"),
        ({"num_samples": 1, **beam()}, "num_samples and beam exclude each other"),
        (beam(0), "beam.width must be 1 to 16: 0"),
        (beam(17), "beam.width must be 1 to 16: 17"),
        (beam(2**32 - 1), "beam.width must be 1 to 16"),
        (beam(4, num_choices=5), r"beam.num_choices is 5, more than beam.width \(4\)"),
        (beam(length_penalty=math.nan), "beam.length_penalty must be finite: nan"),
        (beam(length_penalty=math.inf), "beam.length_penalty must be finite: inf"),
        (beam(length_penalty=-math.inf), "beam.length_penalty must be finite: -inf"),
        (beam(early_stopping=9), "beam.early_stopping has no value 9"),
    ],
)
def test_bad_choices(fields: dict[str, Any], message: str) -> None:
    expect_invalid(message, validation.check_choices, pb.GenerateRequest(**fields), MAX_BRANCHES)


def test_beam_width_has_a_limit_of_its_own() -> None:
    validation.check_choices(pb.GenerateRequest(**beam(32)), 128)
    request = pb.GenerateRequest(**beam(33))
    expect_invalid("beam.width must be 1 to 32: 33", validation.check_choices, request, 128)


def test_good_choices() -> None:
    for num_samples, num_choices in ((0, 1), (1, 1), (16, 16)):
        request = pb.GenerateRequest(num_samples=num_samples)
        choices = validation.check_choices(request, MAX_BRANCHES)
        assert (choices.num_choices, choices.beam) == (num_choices, None)
    choices = validation.check_choices(pb.GenerateRequest(**beam(4)), MAX_BRANCHES)
    assert choices.num_choices == 1
    assert choices.beam == engine_pb2.BeamSearch(
        width=4,
        num_returned=1,
        length_penalty=1,
        early_stopping=engine_pb2.EARLY_STOPPING_HEURISTIC,
    )
    never = beam(4, num_choices=3, length_penalty=0, early_stopping=pb.EARLY_STOPPING_NEVER)
    choices = validation.check_choices(pb.GenerateRequest(**never), MAX_BRANCHES)
    assert choices.num_choices == 3
    assert choices.beam == engine_pb2.BeamSearch(
        width=4, num_returned=3, early_stopping=engine_pb2.EARLY_STOPPING_NEVER
    )


@pytest.mark.parametrize("name", pb.EarlyStopping.keys())
def test_early_stopping_keeps_its_name(name: str) -> None:
    request = pb.GenerateRequest(**beam(early_stopping=pb.EarlyStopping.Value(name)))
    found = validation.check_choices(request, MAX_BRANCHES).beam
    expected = "EARLY_STOPPING_HEURISTIC" if name == "EARLY_STOPPING_UNSPECIFIED" else name
    assert found is not None
    assert engine_pb2.EarlyStopping.Name(found.early_stopping) == expected


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.5}, {"temperature": math.nan}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}],
)
def test_beams_refuse_sampling(fields: dict[str, Any]) -> None:
    (name,) = fields
    params = pb.SamplingParams(**fields)
    expect_invalid(f"sampling.{name} .*beam", validation.check_beam_sampling, params)


def test_beams_are_greedy_whatever_the_models_defaults() -> None:
    for params in (pb.SamplingParams(seed=3), pb.SamplingParams(temperature=0, seed=3)):
        sampling = validation.check_beam_sampling(params)
        assert sampling == validation.Sampling(0.0, 0, 1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": pb.Logprobs(num_candidates=21)}, "logprobs.num_candidates is 21, limit 20"),
        (
            {"logprobs": pb.Logprobs(num_candidates=2**32 - 1)},
            "logprobs.num_candidates is 4294967295, limit 20",
        ),
        (
            {"logprobs": pb.Logprobs(num_candidates=1), **beam()},
            "logprobs.num_candidates must be 0 with beam: 1",
        ),
    ],
)
def test_bad_logprobs(fields: dict[str, Any], message: str) -> None:
    expect_invalid(message, validation.check_logprobs, pb.GenerateRequest(**fields))


def test_logprobs_count_the_tokens_own() -> None:
    assert validation.check_logprobs(pb.GenerateRequest()) == 0
    for num_candidates in (0, 20):
        request = pb.GenerateRequest(logprobs=pb.Logprobs(num_candidates=num_candidates))
        assert validation.check_logprobs(request) == 1 + num_candidates
    request = pb.GenerateRequest(logprobs=pb.Logprobs(), **beam())
    assert validation.check_logprobs(request) == 1


def test_cache_salts() -> None:
    validation.check_cache(pb.PrefixCache(salt=b"x" * 64))
    validation.check_cache(pb.PrefixCache(off=True))
    long = pb.PrefixCache(salt=b"x" * 65)
    expect_invalid("cache.salt has 65 bytes, limit 64", validation.check_cache, long)
    both = pb.PrefixCache(salt=b"x", off=True)
    expect_invalid("cache.salt and cache.off exclude", validation.check_cache, both)

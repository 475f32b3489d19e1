from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from blockyard.common.columns import pack_u32
from blockyard.common.model_dir import ModelDirError
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.beam import EarlyStopping
from scheduler_svc.engine.admission import TextStop, build_request, max_branches, rejection
from scheduler_svc.errors import RequestError
from scheduler_svc.limits import Limits
from scheduler_svc.request import MAX_BRANCHES, Request, Sampling, TokenIds

LIMITS = Limits(
    num_device_blocks=9,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=100,
    vocab_size=50,
)  # holds 8 * 4 token states, so 33 tokens of prompt and output
LARGE = dataclasses.replace(LIMITS, max_num_seqs=500, max_num_batched_tokens=500)


def build(submit: pb.Submit, limits: Limits = LIMITS, text_stop: TextStop | None = None) -> Request:
    return build_request(submit, limits, key=1, frontend=7, now_ns=5, text_stop=text_stop)


def submit(num_prompt_tokens: int = 3, **fields: object) -> pb.Submit:
    prompt = pack_u32(np.arange(num_prompt_tokens))
    return pb.Submit(**{"request_id": 1, "prompt_token_ids": prompt, **fields})  # type: ignore[arg-type]  # by name


def search(num_prompt_tokens: int = 3, width: int = 2, **fields: Any) -> pb.Submit:
    """A beam search; `fields` of BeamSearch."""
    return submit(num_prompt_tokens, beam=pb.BeamSearch(width=width, **fields))


def with_beams(**fields: Any) -> pb.Submit:
    """A beam search; `fields` of Submit."""
    return submit(beam=pb.BeamSearch(width=2), **fields)


# ---- refusals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (submit(0), "empty"),
        (submit(33), "33 tokens"),
        (submit(30, max_tokens=4), "exceed the 33"),
        (submit(max_tokens=2**32 - 1), "exceed the 33"),
        (submit(prompt_token_ids=b"\x01\x00\x00"), "whole number"),
        (submit(prompt_token_ids=pack_u32([50])), "token id 50"),
        (submit(prompt_token_ids=pack_u32([2**32 - 1])), "token id 4294967295"),
        (submit(stop_token_ids=[50]), "stop.token_ids"),
        (submit(temperature=-1.0), "temperature"),
        (submit(temperature=math.nan), "temperature"),
        (submit(top_p=math.inf), "top_p"),
        (submit(top_p=1.5), "top_p"),
        (submit(min_p=-0.5), "min_p"),
        (submit(num_logprobs=22), "logprobs.num_candidates plus one is 22, at most 21"),
        (submit(cache_salt=b"s" * 65), "cache.salt has 65 bytes, at most 64"),
        (submit(stop_strings=["\n"]), "front end's business"),
        (submit(num_samples=5), "num_samples is 5, at most 4"),
        (submit(num_samples=2**32 - 1), "num_samples is 4294967295"),
    ],
)
def test_what_can_never_run_is_refused(bad: pb.Submit, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        build(bad)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    answer = rejection(7, error.value)
    assert (answer.request_id, answer.message) == (7, str(error.value))
    assert answer.reason in ("INVALID_FIELD", "TOO_LONG")
    assert answer.subject


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (search(width=0), "width is 0, it must be 1 to 4"),
        (search(width=5), "width is 5, it must be 1 to 4"),
        (search(width=2, num_returned=3), "num_choices is 3, beam.width only 2"),
        (search(length_penalty=math.nan), "length_penalty is nan"),
        (search(length_penalty=-math.inf), "length_penalty is -inf"),
        (search(early_stopping=9), "early_stopping is 9"),
        (with_beams(temperature=0.5), "sampling.temperature must be 0"),
        (with_beams(num_samples=2), "exclude each other"),
        (with_beams(num_logprobs=2), "log-probability of their own tokens"),
        # Seven of eight blocks are shared; there are not two for a last one each.
        (search(29), "hold 29 tokens of prompt and output together for 2 beams"),
        (with_beams(max_tokens=18), "exceed the 17 tokens .* for 2 beams"),
    ],
)
def test_searches_that_can_never_run_are_refused(bad: pb.Submit, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        build(bad)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_large_executor_has_limits_too() -> None:
    assert max_branches(LARGE) == MAX_BRANCHES
    assert max_branches(LIMITS) == 4
    assert build(search(width=32), dataclasses.replace(LARGE, num_device_blocks=99)).width == 32
    with pytest.raises(RequestError, match="width is 33, it must be 1 to 32"):
        build(search(width=33), LARGE)
    with pytest.raises(RequestError, match="num_samples is 129, at most 128"):
        build(submit(num_samples=129), LARGE)


def test_stop_strings_of_a_search_need_the_model_directory() -> None:
    with pytest.raises(RequestError, match="model directory") as error:
        build(with_beams(stop_strings=["x"]))
    assert error.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_model_directory_that_cannot_be_read_refuses_the_request_alone() -> None:
    def unreadable(strings: Sequence[str]) -> Callable[[TokenIds], bool]:
        raise ModelDirError("no tokenizer.json")

    with pytest.raises(RequestError, match=r"no tokenizer\.json") as error:
        build(with_beams(stop_strings=["x"]), text_stop=unreadable)
    assert error.value.code is grpc.StatusCode.FAILED_PRECONDITION


# ---- requests


def test_unset_max_tokens_means_what_fits() -> None:
    assert build(submit()).max_total_tokens == 33
    assert build(submit(max_tokens=5)).max_total_tokens == 8
    assert build(submit(32)).max_total_tokens == 33
    assert build(search(3)).max_total_tokens == 17  # four blocks each
    assert build(search(8)).max_total_tokens == 21  # two shared, three each
    assert build(submit(3, num_samples=4)).max_total_tokens == 33  # one at a time


def test_what_was_asked_for_arrives() -> None:
    request = build(
        submit(
            3,
            request_id=9,
            temperature=0.5,
            top_k=7,
            top_p=0.25,
            min_p=0.125,
            seed=2**64 - 1,
            num_logprobs=21,
            stop_token_ids=[4, 5],
            num_samples=3,
            cache_salt=b"s" * 64,
            cache_off=True,
        )
    )
    assert (request.key, request.frontend, request.request_id, request.arrival_ns) == (1, 7, 9, 5)
    assert request.prompt.tolist() == [0, 1, 2]
    assert request.prompt.dtype == np.int32
    assert request.sampling == Sampling(0.5, 7, 0.25, 0.125, 2**64 - 1, 21)
    assert request.stop_token_ids == {4, 5}
    assert len(request.branches) == request.num_samples == 3
    assert (request.cache_salt, request.is_cache_private) == (b"s" * 64, True)


def test_nothing_asked_for_is_one_greedy_sample() -> None:
    request = build(submit())
    assert len(request.branches) == 1
    assert (request.beam, request.is_text_stopped, request.is_cache_private) == (None, None, False)
    assert request.sampling == Sampling(top_p=0.0)


def test_a_search_arrives() -> None:
    beam = build(
        search(width=4, num_returned=3, length_penalty=-0.5, early_stopping=pb.EARLY_STOPPING_NEVER)
    ).beam
    assert beam is not None
    assert (beam.width, beam.num_returned, beam.length_penalty) == (4, 3, -0.5)
    assert beam.early_stopping is EarlyStopping.NEVER
    beam = build(search(width=2)).beam
    assert beam is not None
    assert (beam.num_returned, beam.early_stopping) == (1, EarlyStopping.HEURISTIC)


def test_stop_strings_of_a_search_become_a_check() -> None:
    asked: list[Sequence[str]] = []

    def text_stop(strings: Sequence[str]) -> Callable[[TokenIds], bool]:
        asked.append(list(strings))
        return lambda token_ids: bool(token_ids[-1] == 3)

    request = build(with_beams(stop_strings=["x", "yz"]), text_stop=text_stop)
    assert asked == [["x", "yz"]]
    assert request.is_text_stopped is not None
    assert request.is_text_stopped(np.array([1, 3], np.int32))

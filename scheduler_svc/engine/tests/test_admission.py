import grpc
import numpy as np
import pytest

from blockyard.common.columns import pack_u32
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.admission import RejectedError, build_request
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Limits

LIMITS = Limits(
    num_device_blocks=9,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=100,
    vocab_size=50,
)  # holds 8 * 4 token states, so 33 tokens of prompt and output


def build(submit: pb.Submit) -> Request:
    return build_request(submit, LIMITS, key=1, frontend=1, now_ns=5)


def submit(num_prompt_tokens: int = 3, **fields: object) -> pb.Submit:
    prompt = pack_u32(np.arange(num_prompt_tokens))
    return pb.Submit(**{"request_id": 1, "prompt_token_ids": prompt, **fields})  # type: ignore[arg-type]  # by name


def test_unset_max_tokens_means_what_fits() -> None:
    assert build(submit()).max_total_tokens == 33
    assert build(submit(max_tokens=5)).max_total_tokens == 8
    assert build(submit(32)).max_total_tokens == 33


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (submit(0), "empty"),
        (submit(33), "33 tokens"),
        (submit(30, max_tokens=4), "exceed the 33"),
        (submit(prompt_token_ids=b"\x01\x00\x00"), "whole number"),
        (submit(prompt_token_ids=pack_u32([50])), "token id 50"),
        (submit(stop_token_ids=[50]), "stop token"),
        (submit(temperature=-1.0), "temperature"),
        (submit(temperature=float("nan")), "temperature"),
        (submit(top_p=float("inf")), "top_p"),
    ],
)
def test_what_can_never_run_is_refused(bad: pb.Submit, message: str) -> None:
    with pytest.raises(RejectedError, match=message) as error:
        build(bad)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.as_rejection(7).code == 3

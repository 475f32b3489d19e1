"""Whatever bytes arrive: they are refused by a typed error and change nothing, or can be used."""

from __future__ import annotations

import copy
import random

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard.common.columns import pack_u32
from blockyard.common.model_dir import SamplingDefaults
from blockyard.engine.v1 import engine_pb2
from blockyard.executor.v1 import executor_pb2
from blockyard.v1 import generate_pb2
from executor_svc.plan import PlanError, decode
from executor_svc.plan_check import check
from executor_svc.row_state import RowState
from executor_svc.tests.test_plan_check import INFO, LEGAL, decoding_rows
from integration_tests.hostile_messages import valid_request
from integration_tests.message_strategies import encodings
from scheduler_svc.engine.admission import build_request
from scheduler_svc.errors import RequestError
from scheduler_svc.frontend import validation
from scheduler_svc.frontend.parsing import parse
from scheduler_svc.limits import Limits

LIMITS = Limits(
    num_device_blocks=9,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=100,
    vocab_size=50,
)
MANY = settings(max_examples=400, deadline=None)


@MANY
@given(encodings(executor_pb2.StepPlan, list(LEGAL.values())))
def test_a_plan_is_refused_or_can_be_applied(data: bytes) -> None:
    try:
        message = executor_pb2.StepPlan.FromString(data)
    except DecodeError:
        return  # gRPC's affair
    state = decoding_rows()
    before = _contents(state)
    try:
        plan = decode(message)
        check(plan, state, INFO)
    except PlanError:
        np.testing.assert_equal(_contents(state), before)
        return
    state.apply(plan)
    assert (state.num_tokens <= INFO.max_model_len).all()


def _contents(state: RowState) -> dict[str, object]:
    """A copy of all columns and histories."""
    contents = copy.deepcopy(vars(state))
    logs = contents.pop("_logs")
    return {**contents, "logs": {row: vars(log) for row, log in logs.items()}}


SUBMITS = [
    engine_pb2.Submit(request_id=1, prompt_token_ids=pack_u32([1, 2, 3]), top_p=1),
    engine_pb2.Submit(prompt_token_ids=pack_u32([4]), beam=engine_pb2.BeamSearch(width=2)),
]


@MANY
@given(encodings(engine_pb2.Submit, SUBMITS), st.integers(0, 2**62))
def test_a_submit_is_refused_or_becomes_a_request(data: bytes, now_ns: int) -> None:
    try:
        submit = engine_pb2.Submit.FromString(data)
    except DecodeError:
        return  # gRPC's affair
    try:
        request = build_request(submit, LIMITS, key=1, frontend=0, now_ns=now_ns)
    except RequestError:
        return
    assert 0 < request.num_prompt_tokens < request.max_total_tokens <= LIMITS.max_total_tokens
    assert request.prompt.max() < LIMITS.vocab_size


class _Model:
    """What validation reads of a model directory."""

    vocab_size = 50
    eos_token_ids = (2,)
    sampling_defaults = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)


REQUESTS = [valid_request(random.Random(seed)) for seed in range(8)]


@MANY
@given(encodings(generate_pb2.GenerateRequest, REQUESTS))
def test_a_request_is_refused_or_wanted(data: bytes) -> None:
    try:
        request = parse(generate_pb2.GenerateRequest, data)
        assert validation.check_request_id(request)
        wanted = validation.check(request, _Model(), max_branches=16)  # type: ignore[arg-type]
    except RequestError as error:
        assert error.code.name == "INVALID_ARGUMENT", error  # noqa: PT017 - or it is valid
        return
    assert 0 <= wanted.sampling.temperature <= validation.MAX_TEMPERATURE
    assert 1 <= wanted.choices.num_choices <= 16

"""Errors of the public service, with the details that clients act on."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_status import rpc_status

from blockyard.client.errors import BlockyardError, from_rpc
from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.tests.conftest import MAX_MODEL_LEN, Service


def prompt_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="The quick", **fields)


async def details_of(call: Awaitable[Any]) -> tuple[list[str], BlockyardError]:
    """Which details the error of a call has, and what our client makes of them."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    return [detail.TypeName() for detail in status.details], from_rpc(caught.value)


async def test_a_full_queue_says_when_to_retry(service: Service) -> None:
    call = service.stub.GenerateUnary(prompt_request())
    submit, _ = await service.engine.next_submit()
    refusal = engine_pb2.Rejection(
        request_id=submit.request_id,
        message="full",
        reason="QUEUE_FULL",
        subject="waiting requests",
        retry_delay_ns=2_500_000_000,
    )
    await service.engine.send(engine_pb2.OutputBatch(rejections=[refusal]))
    names, error = await details_of(call)
    assert names == ["google.rpc.ErrorInfo", "google.rpc.QuotaFailure", "google.rpc.RetryInfo"]
    assert (error.reason, error.is_retryable, error.retry_delay_s) == ("QUEUE_FULL", True, 2.5)


async def test_an_unreachable_deadline_is_told_from_one_that_passed(service: Service) -> None:
    call = service.stub.GenerateUnary(prompt_request(priority=-3), timeout=30)
    submit, _ = await service.engine.next_submit()
    assert submit.priority == -3
    refusal = engine_pb2.Rejection(request_id=submit.request_id, reason="DEADLINE_UNREACHABLE")
    await service.engine.send(engine_pb2.OutputBatch(rejections=[refusal]))
    names, error = await details_of(call)
    assert names == ["google.rpc.ErrorInfo"]
    assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE")
    assert not error.is_retryable


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        (prompt_request(sampling=pb.SamplingParams(top_p=2)), "sampling.top_p", "INVALID_FIELD"),
        (prompt_request(priority=11), "priority", "INVALID_FIELD"),
        (prompt_request(priority=-11), "priority", "INVALID_FIELD"),
        (pb.GenerateRequest(), "input", "INVALID_FIELD"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * MAX_MODEL_LEN)), "input", "TOO_LONG"),
        (
            prompt_request(stop=pb.StopConditions(max_tokens=MAX_MODEL_LEN)),
            "stop.max_tokens",
            "TOO_LONG",
        ),
    ],
)
async def test_bad_fields_are_named(
    request_: pb.GenerateRequest, field: str, reason: str, service: Service
) -> None:
    names, error = await details_of(service.stub.GenerateUnary(request_))
    assert names == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    assert (error.code, error.reason, error.fields) == ("INVALID_ARGUMENT", reason, (field,))
    assert not error.is_retryable


async def test_an_engine_that_is_lost_can_be_retried(service: Service) -> None:
    call = service.stub.GenerateUnary(prompt_request())
    await service.engine.next_submit()
    await service.engine.kill()
    names, error = await details_of(call)
    assert names == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
    assert (error.code, error.reason, error.is_retryable) == ("UNAVAILABLE", "ENGINE_LOST", True)

"""Errors as google.rpc details, for the public API. Only here."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from scheduler_svc.errors import ERRORS, Reason, RequestError

DOMAIN: Final = "blockyard.v1"
"""ErrorInfo.domain of every error that is the service's own."""

DETAILS_KEY: Final = "grpc-status-details-bin"

_SLOW_READER_S: Final = 1.0
"""How long a client that did not read has to take its status."""

_EXHAUSTED: Final = (
    Reason.REQUEST_TOO_LARGE,
    Reason.TOO_MANY_STREAMS,
    Reason.QUEUE_FULL,
    Reason.SLOW_READER,
)


def status_of(error: RequestError) -> status_pb2.Status:
    """The status with ErrorInfo and whatever else the error tells."""
    message = str(error)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={"retryable": str(ERRORS[error.reason].is_retryable).lower()},
        )
    ]
    if error.reason in _EXHAUSTED:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.subject, description=message
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    elif error.subject:
        field = error_details_pb2.BadRequest.FieldViolation(
            field=error.subject, description=message, reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[field]))
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> NoReturn:
    """End the call with the error. Before the first message it goes out without headers.

    A status comes after what was written before. If a slow reader does not take that, the call is
    cut off instead, and the client sees CANCELLED.
    """
    details = status_of(error).SerializeToString()
    timeout_s = _SLOW_READER_S if error.reason is Reason.SLOW_READER else None
    try:
        async with asyncio.timeout(timeout_s):
            await context.abort(error.code, str(error), ((DETAILS_KEY, details),))
    except TimeoutError:
        raise asyncio.CancelledError(str(error)) from error
    raise AssertionError("abort returned")

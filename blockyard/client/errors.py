"""The one exception of the client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from blockyard.common.tls import handshake_problem

_DETAILS_KEY = "grpc-status-details-bin"


class BlockyardError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status name, e.g. "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE",
            "DEADLINE_EXCEEDED" (the call's timeout passed, or could not be met) or "INTERNAL".
        message: for people.
        reason: which error of docs/api.md, e.g. "QUEUE_FULL"; empty if it is not the service's own
            (no server, the timeout passed).
        is_retryable: whether the same call, unchanged, may well succeed later.
        retry_delay_s: when another try may be worth it [s]; None: not said.
        fields: paths of the request's fields that are wrong.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        reason: str = "",
        is_retryable: bool = False,
        retry_delay_s: float | None = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.is_retryable = is_retryable
        self.retry_delay_s = retry_delay_s
        self.fields = fields


def from_rpc(error: grpc.RpcError) -> BlockyardError:
    """The client's form of an error that a call of the gRPC library raised."""
    call: Any = error  # calls raise objects that are RpcError and Call at once
    code: grpc.StatusCode = call.code()
    details = call.details() or ""
    if (problem := handshake_problem(details)) is not None:
        details = f"no connection to the server: {problem}"
    result = BlockyardError(code.name, details, is_retryable=code is grpc.StatusCode.UNAVAILABLE)
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            # Details that cannot be read leave the code and the message.
            with contextlib.suppress(DecodeError):
                _add_details(result, status_pb2.Status.FromString(value))
    return result


def _add_details(error: BlockyardError, status: status_pb2.Status) -> None:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info):
            error.reason = info.reason
            error.is_retryable = info.metadata.get("retryable") == "true"
        elif detail.Unpack(retry):
            error.retry_delay_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(bad):
            error.fields = tuple(violation.field for violation in bad.field_violations)


@contextlib.contextmanager
def rpc_errors() -> Iterator[None]:
    """Raise what the gRPC library raises inside, blocking or not, as BlockyardError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error

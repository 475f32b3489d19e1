"""The one exception of the client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc


class BlockyardError(Exception):
    """A call failed.

    `code` is the gRPC status name, e.g. "INVALID_ARGUMENT" (the message says which field),
    "RESOURCE_EXHAUSTED" (queue full: retry later), "UNAVAILABLE" (no server, or not ready: retry),
    "DEADLINE_EXCEEDED" (the call's timeout) or "INTERNAL" (this request failed alone).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def from_rpc(error: grpc.RpcError) -> BlockyardError:
    """The client's form of an error that a call of the gRPC library raised."""
    call: Any = error  # calls raise objects that are RpcError and Call at once
    code: grpc.StatusCode = call.code()
    return BlockyardError(code.name, call.details() or "")


@contextlib.contextmanager
def rpc_errors() -> Iterator[None]:
    """Raise what the gRPC library raises inside, blocking or not, as BlockyardError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error

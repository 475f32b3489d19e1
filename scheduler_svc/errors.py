"""Every error of the public API, in one table. docs/api.md has it for people."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

import grpc


class Reason(enum.StrEnum):
    """Which error; ErrorInfo.reason on the wire."""

    INVALID_FIELD = "INVALID_FIELD"
    TOO_LONG = "TOO_LONG"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    NOT_CONFIGURED = "NOT_CONFIGURED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    QUEUE_FULL = "QUEUE_FULL"
    SLOW_READER = "SLOW_READER"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    NOT_READY = "NOT_READY"
    DRAINING = "DRAINING"
    ENGINE_LOST = "ENGINE_LOST"
    REQUEST_FAILED = "REQUEST_FAILED"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What an error means to a client."""

    code: grpc.StatusCode
    when: str
    remedy: str
    is_retryable: bool = False  # the same request, unchanged, may well succeed later


ERRORS: Final = {
    Reason.INVALID_FIELD: ErrorKind(
        grpc.StatusCode.INVALID_ARGUMENT,
        "a field is malformed, out of range, or excluded by another one",
        "correct the field that BadRequest names",
    ),
    Reason.TOO_LONG: ErrorKind(
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt and output together are more than model and KV memory hold",
        "shorten the prompt, or lower the field that BadRequest names",
    ),
    Reason.REQUEST_TOO_LARGE: ErrorKind(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the request has more bytes, or its prompt more tokens, than this server takes "
        "(`--max-request-bytes`, `--max-prompt-tokens`)",
        "shorten the prompt",
    ),
    Reason.NOT_CONFIGURED: ErrorKind(
        grpc.StatusCode.FAILED_PRECONDITION,
        "beam search with stop strings, and the engine was started without the model directory",
        "start the engine with `--model-dir`",
    ),
    Reason.UNAUTHENTICATED: ErrorKind(
        grpc.StatusCode.UNAUTHENTICATED,
        "no token, or one that the server does not know (`--auth-tokens`)",
        "send `authorization: Bearer` and a token",
    ),
    Reason.TOO_MANY_STREAMS: ErrorKind(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "this client has as many calls open as it may (`--max-client-streams`)",
        "retry when one of them has ended",
        is_retryable=True,
    ),
    Reason.QUEUE_FULL: ErrorKind(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "as many requests, or prompt tokens, wait as may (`--max-waiting`, `--max-waiting-tokens`)",
        "retry after RetryInfo's delay, or elsewhere",
        is_retryable=True,
    ),
    Reason.SLOW_READER: ErrorKind(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the client let too much output wait, or took none for too long (`--max-buffered-tokens`, "
        "`--slow-reader-timeout-s`)",
        "read faster, or ask for less at once; what was received is valid",
    ),
    Reason.DEADLINE_UNREACHABLE: ErrorKind(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the request waited, and what is left until its deadline is too little; nothing was "
        "computed",
        "give more time, or retry when there is less load",
    ),
    Reason.NOT_READY: ErrorKind(
        grpc.StatusCode.UNAVAILABLE,
        "the engine has no executor yet, or the front end no engine",
        "retry after RetryInfo's delay",
        is_retryable=True,
    ),
    Reason.DRAINING: ErrorKind(
        grpc.StatusCode.UNAVAILABLE,
        "this front end is shutting down",
        "retry; another front end takes it",
        is_retryable=True,
    ),
    Reason.ENGINE_LOST: ErrorKind(
        grpc.StatusCode.UNAVAILABLE,
        "the engine ended while it worked on the request",
        "retry after RetryInfo's delay; with the same seed the output is the same",
        is_retryable=True,
    ),
    Reason.REQUEST_FAILED: ErrorKind(
        grpc.StatusCode.INTERNAL,
        "this request failed alone: logits that are not finite, or in flight each time the "
        "executor was lost",
        "do not repeat it unchanged",
    ),
    Reason.INTERNAL_ERROR: ErrorKind(
        grpc.StatusCode.INTERNAL,
        "a bug of the service; its log says more",
        "report it",
    ),
}


class RequestError(Exception):
    """A request ends with an error of the table; the message goes to the client."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        subject: str = "",
        retry_delay_s: float | None = None,
    ) -> None:
        """Describe one error.

        Args:
            reason: which one of the table.
            message: for people; names what is wrong and the limit.
            subject: path of the wrong field, or what is exhausted.
            retry_delay_s: when another try may be worth it, if that is known [s].
        """
        super().__init__(message)
        self.reason = reason
        self.subject = subject
        self.retry_delay_s = retry_delay_s

    @property
    def code(self) -> grpc.StatusCode:
        """The status that the client gets."""
        return ERRORS[self.reason].code


def invalid(subject: str, problem: str) -> RequestError:
    """INVALID_FIELD: what is wrong with the field of that path."""
    return RequestError(Reason.INVALID_FIELD, f"{subject} {problem}", subject=subject)


def too_long(subject: str, message: str) -> RequestError:
    """TOO_LONG: shortening the field of that path may help."""
    return RequestError(Reason.TOO_LONG, message, subject=subject)

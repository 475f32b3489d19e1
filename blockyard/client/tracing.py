"""The client's part of a trace, if the application has OpenTelemetry: a CLIENT span for each call,
and its W3C context in the call's metadata.

Spans go wherever the application's global tracer provider sends them. Without one no span is made,
and the context of whatever span is current still travels. Prompts and outputs are in no span.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from blockyard.client.errors import BlockyardError
from blockyard.v1 import generate_pb2 as pb

try:
    from opentelemetry import trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    HAS_OPENTELEMETRY = False
else:
    HAS_OPENTELEMETRY = True
    _PROPAGATOR: Final = TraceContextTextMapPropagator()

Metadata = tuple[tuple[str, str], ...]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GenerateService"].full_name


@contextlib.contextmanager
def traced_call(method: str, address: str) -> Iterator[Metadata]:
    """Trace one call of `method`, e.g. GetModel; yields what to add to its metadata.

    The span is never made the current one: a stream is read from wherever the application likes.
    """
    if not HAS_OPENTELEMETRY:
        yield ()
        return
    span = trace.get_tracer("blockyard.client").start_span(
        f"{_SERVICE}/{method}", kind=SpanKind.CLIENT, attributes=_attributes(method, address)
    )
    status = "UNKNOWN"
    try:
        yield _headers(span)
        status = "OK"
    except BlockyardError as error:
        status = error.code
        raise
    except (asyncio.CancelledError, GeneratorExit):
        status = "CANCELLED"
        raise
    finally:
        span.set_attribute("rpc.response.status_code", status)
        if status != "OK":
            span.set_attribute("error.type", status)
            span.set_status(Status(StatusCode.ERROR, status))
        span.end()


def _attributes(method: str, address: str) -> dict[str, str | int]:
    host, _, port = address.rpartition(":")
    attributes: dict[str, str | int] = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{_SERVICE}/{method}",
        "server.address": address,
    }
    if port.isdecimal():
        attributes |= {"server.address": host.strip("[]"), "server.port": int(port)}
    return attributes


def _headers(span: Span) -> Metadata:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return tuple(carrier.items())

"""A small OTLP/gRPC collector that keeps what it is sent, and how to read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


class Event(NamedTuple):
    """One event of a span."""

    name: str
    attributes: dict[str, Any]


class Span(NamedTuple):
    """One span, with the service that it is of."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty: a root
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool
    events: list[Event]
    linked_trace_ids: set[str]


class TraceCollector(pb_grpc.TraceServiceServicer):
    """Collects in the test's own loop."""

    def __init__(self, address: str) -> None:
        """Listen on `address`, once started."""
        self.address = address
        self.spans: list[Span] = []
        self._server = grpc.aio.server()
        add: Any = pb_grpc.add_TraceServiceServicer_to_server  # has no types
        add(self, self._server)
        self._server.add_insecure_port(self.address)

    async def start(self) -> None:
        """Begin to listen."""
        await self._server.start()

    async def stop(self) -> None:
        """Stop at once."""
        await self._server.stop(None)

    async def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        """Keep a batch."""
        for group in request.resource_spans:
            service = _attributes(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                self.spans += [_span(service, span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Span]:
        """The spans of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]

    def named(self, name: str) -> list[Span]:
        """Spans of any trace."""
        return [span for span in self.spans if span.name == name]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for what was to be collected. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition, not only events
                await asyncio.sleep(0.02)


def covered_share(span: Span, children: Iterable[Span]) -> float:
    """Part of the span's time that at least one child covers, 0 to 1."""
    covered_ns, until_ns = 0, span.start_ns
    for child in sorted(children, key=lambda child: child.start_ns):
        begin_ns, end_ns = max(child.start_ns, until_ns), min(child.end_ns, span.end_ns)
        if end_ns > begin_ns:
            covered_ns += end_ns - begin_ns
            until_ns = end_ns
    return covered_ns / (span.end_ns - span.start_ns)


def _span(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        span.status.code == span.status.STATUS_CODE_ERROR,
        [Event(event.name, _attributes(event.attributes)) for event in span.events],
        {link.trace_id.hex() for link in span.links},
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from scheduler_svc.frontend.tests.calls import until
from scheduler_svc.frontend.tracing import RpcTracing, parent_context
from scheduler_svc.telemetry.export import TraceExport

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


async def _stream(data: bytes, context: Any) -> None:
    """Does what it is told."""
    await context.write(data)
    if data == b"abort":
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
    if data == b"unavailable":
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
    if data == b"bug":
        raise ValueError("a bug")
    if data == b"wait":
        await asyncio.sleep(60)


async def _unary(data: bytes, context: Any) -> bytes:
    return data


class Server:
    """A traced server with one service of two methods, and one that is not traced."""

    def __init__(self, channel: grpc.aio.Channel, spans: InMemorySpanExporter) -> None:
        self.channel: Any = channel  # calls that have no types
        self.spans = spans

    async def call(
        self, data: bytes, timeout_s: float | None = None, method: str = "/s/Stream"
    ) -> None:
        call = self.channel.unary_stream(method)(
            data, metadata=(("traceparent", PARENT),), timeout=timeout_s
        )
        async for _ in call:
            pass

    async def span(self) -> ReadableSpan:
        await until(lambda: bool(self.spans.get_finished_spans()))
        (span,) = self.spans.get_finished_spans()
        return span


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    spans = InMemorySpanExporter()
    tracer = TraceExport(SimpleSpanProcessor(spans)).tracer("s", 1.0)
    server = grpc.aio.server(interceptors=[RpcTracing(tracer, "s", 0.0)])
    stream: Any = grpc.unary_stream_rpc_method_handler(_stream)
    unary: Any = grpc.unary_unary_rpc_method_handler(_unary)
    for service in ("s", "other"):
        methods = {"Stream": stream, "Unary": unary}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    address = f"unix:{tmp_path}/s.sock"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Server(channel, spans)
    await server.stop(None)


@pytest.mark.parametrize(
    ("data", "status", "is_error"),
    [
        (b"ok", "OK", False),
        (b"abort", "RESOURCE_EXHAUSTED", False),
        (b"unavailable", "UNAVAILABLE", True),
        (b"bug", "UNKNOWN", True),
    ],
)
async def test_the_status_is_the_one_that_was_sent(
    server: Server, data: bytes, status: str, is_error: bool
) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await server.call(data)
    span = await server.span()
    attributes = span.attributes or {}
    assert attributes["rpc.response.status_code"] == status
    assert (span.status.status_code is trace.StatusCode.ERROR) == is_error
    assert ("error.type" in attributes) == is_error
    assert (span.name, span.kind) == ("s/Stream", trace.SpanKind.SERVER)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE_ID
    assert not span.events


async def test_a_deadline_is_not_a_cancellation(server: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        await server.call(b"wait", timeout_s=0.2)
    assert ((await server.span()).attributes or {})[
        "rpc.response.status_code"
    ] == "DEADLINE_EXCEEDED"


async def test_a_cancellation(server: Server) -> None:
    call = server.channel.unary_stream("/s/Stream")(
        b"wait", metadata=(("traceparent", PARENT),), timeout=30
    )
    await call.read()
    call.cancel()
    span = await server.span()
    assert (span.attributes or {})["rpc.response.status_code"] == "CANCELLED"
    assert span.status.is_unset


async def test_unary_calls_too_and_other_services_not(server: Server) -> None:
    await server.call(b"ok", method="/other/Stream")
    for _ in range(5):  # without a header the ratio decides, which is 0 here
        assert await server.channel.unary_unary("/s/Unary")(b"x") == b"x"
    metadata = (("traceparent", PARENT),)
    assert await server.channel.unary_unary("/s/Unary")(b"x", metadata=metadata) == b"x"
    assert (await server.span()).name == "s/Unary"


@pytest.mark.parametrize(
    "value", ["", "00", "zz" * 27, PARENT[:-3], PARENT + "-00", "00-" + "0" * 32 + PARENT[35:], "é"]
)
def test_a_malformed_header_is_ignored(value: str) -> None:
    context = parent_context((("traceparent", value), ("x-bin", b"\xff"), ("traceparent", b"x")))
    assert not trace.get_current_span(context).get_span_context().is_valid

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from blockyard.client import AsyncClient, BlockyardError, Client
from blockyard.client.tests.scripted_server import ScriptedServer


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """An application with OpenTelemetry; the global provider can be set only once in a process."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def only(spans: InMemorySpanExporter) -> tuple[ReadableSpan, Any]:
    """The one span, and its attributes."""
    (span,) = spans.get_finished_spans()
    return span, span.attributes


def header_of(span: ReadableSpan) -> str:
    assert span.context is not None
    own = span.context
    return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"


def test_each_call_is_a_span_whose_context_travels(
    server: ScriptedServer, spans: InMemorySpanExporter
) -> None:
    with Client(server.address) as client:
        list(client.generate("hi"))
        client.complete("hi")
        client.model()
    found = spans.get_finished_spans()
    methods = ("Generate", "GenerateUnary", "GetModel")
    assert [span.name for span in found] == [f"blockyard.v1.GenerateService/{m}" for m in methods]
    assert {span.kind for span in found} == {trace.SpanKind.CLIENT}
    host, port = server.address.split(":")
    for span in found:
        attributes = span.attributes or {}
        assert attributes["rpc.response.status_code"] == "OK"
        assert (attributes["server.address"], attributes["server.port"]) == (host, int(port))
        assert span.status.is_unset
    assert server.trace_headers == [header_of(span) for span in found[:2]]


async def test_each_asynchronous_call_too(
    server: ScriptedServer, spans: InMemorySpanExporter
) -> None:
    async with AsyncClient(server.address) as client:
        async for _ in client.generate("hi"):
            pass
        await client.complete("hi")
        await client.model()
    found = spans.get_finished_spans()
    assert [span.name.rpartition("/")[2] for span in found] == [
        *("Generate", "GenerateUnary", "GetModel")
    ]
    assert server.trace_headers == [header_of(span) for span in found[:2]]


def test_it_goes_under_the_current_span(
    server: ScriptedServer, spans: InMemorySpanExporter
) -> None:
    parent = trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(1))
    with Client(server.address) as client, trace.use_span(trace.NonRecordingSpan(parent)):
        client.complete("hi")
    span, _ = only(spans)
    assert span.parent == parent


@pytest.mark.parametrize(
    ("prompt", "timeout", "status"),
    [("fail", None, "INVALID_ARGUMENT"), ("slow", 0.1, "DEADLINE_EXCEEDED")],
)
async def test_a_failure_is_an_error(
    server: ScriptedServer,
    spans: InMemorySpanExporter,
    prompt: str,
    timeout: float | None,
    status: str,
) -> None:
    with Client(server.address) as client, pytest.raises(BlockyardError):
        client.complete(prompt, timeout=timeout)
    async with AsyncClient(server.address) as client_aio:
        with pytest.raises(BlockyardError):
            await anext(client_aio.generate(prompt, timeout=timeout))
    for span in spans.get_finished_spans():
        attributes = span.attributes or {}
        assert attributes["rpc.response.status_code"] == attributes["error.type"] == status
        assert span.status.status_code is trace.StatusCode.ERROR
        assert not span.events  # messages may quote the request


async def test_a_stream_that_is_closed_early_was_cancelled(
    server: ScriptedServer, spans: InMemorySpanExporter
) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.generate("endless")
        await anext(stream)
        assert not spans.get_finished_spans()
        await stream.aclose()
    _, attributes = only(spans)
    assert attributes["rpc.response.status_code"] == "CANCELLED"


def test_without_a_provider_the_current_context_travels(server: ScriptedServer) -> None:
    parent = trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(1))
    with Client(server.address) as client:
        client.complete("hi")
        with trace.use_span(trace.NonRecordingSpan(parent)):
            client.complete("hi")
    assert server.trace_headers == ["", f"00-{7:032x}-{8:016x}-01"]


def test_without_opentelemetry_it_works_as_ever(server: ScriptedServer) -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from blockyard.client import Client\n"
        "with Client(sys.argv[1]) as client: print(client.complete('hi').text)"
    )
    command = [sys.executable, "-c", program, server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("HI\n", 0), done.stderr
    assert server.trace_headers == [""]

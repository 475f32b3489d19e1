"""One trace from a client through Envoy to the executor, as a collector that others wrote takes it.

Everybody sends to rotel, which sends what it understood on to the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from blockyard.client import AsyncClient, BlockyardError
from integration_tests.harness import Processes
from integration_tests.mesh.peer import free_port, running_peer
from integration_tests.mesh.tools import ENVOY, ROTEL, need
from integration_tests.trace_collector import Span, TraceCollector, covered_share
from integration_tests.traced_system import (
    FATAL_SEED,
    MAX_MODEL_LEN,
    NAN_SEED,
    PROMPT,
    traced_system,
)

RPC: Final = "blockyard.v1.GenerateService/Generate"
OURS: Final = frozenset({"blockyard-frontend", "blockyard-engine", "blockyard-executor"})


def envoy_config(port: int, frontend: str, collector_port: int) -> dict[str, Any]:
    """A proxy with one upstream, which traces every call as its caller wants."""
    http2 = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    prefix = "type.googleapis.com/envoy"

    def cluster(name: str, address: dict[str, Any]) -> dict[str, Any]:
        endpoint = {"endpoint": {"address": address}}
        return {
            "name": name,
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": http2,
                    "explicit_http_config": {"http2_protocol_options": {}},
                }
            },
        }

    def loopback(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    tracer = {
        "@type": f"{prefix}.config.trace.v3.OpenTelemetryConfig",
        "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}},
        "service_name": "envoy",
    }
    router = {"@type": f"{prefix}.extensions.filters.http.router.v3.Router"}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "frontend", "timeout": "0s"}}
    manager = {
        "@type": f"{prefix}.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        "tracing": {"provider": {"name": "envoy.tracers.opentelemetry", "typed_config": tracer}},
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    pipe = {"pipe": {"path": frontend.removeprefix("unix:")}}
    return {
        "static_resources": {
            "listeners": [{"address": loopback(port), "filter_chains": [{"filters": filters}]}],
            "clusters": [cluster("frontend", pipe), cluster("collector", loopback(collector_port))],
        },
        # Spans leave at once, not when a buffer is full.
        "layered_runtime": {
            "layers": [
                {
                    "name": "test",
                    "static_layer": {
                        "tracing.opentelemetry.min_flush_spans": 1,
                        "tracing.opentelemetry.flush_interval_ms": 100,
                    },
                }
            ]
        },
    }


class Mesh:
    """A client behind a proxy, and what the collector hands on."""

    def __init__(self, address: str, processes: Processes, backend: TraceCollector) -> None:
        self.address, self.processes, self.backend = address, processes, backend
        self.client = AsyncClient(address)

    async def generate(
        self, num_tokens: int, *, timeout_s: float | None = None, **options: Any
    ) -> tuple[str, str]:
        """One stream to its end; returns its trace id and status."""
        context = _sampled_context()
        # As an application does that has a span of its own around the call.
        with trace.use_span(trace.NonRecordingSpan(context)):
            chunks = self.client.generate(
                token_ids=PROMPT,
                max_tokens=num_tokens,
                temperature=0,
                ignore_eos=True,
                timeout=timeout_s,
                **options,
            )
            status = "OK"
            try:
                async for _ in chunks:
                    pass
            except BlockyardError as error:
                status = error.code
        return f"{context.trace_id:032x}", status

    async def spans(self, trace_id: str, *names: str) -> list[Span]:
        """The spans of a trace, once those of everybody it went through have come."""
        wanted = {"llm_request", *names}
        of = self.backend.of

        def is_complete() -> bool:
            have = of(trace_id)
            services = {span.service for span in have if span.name == RPC}
            return wanted <= {s.name for s in have} and {"client", "blockyard-frontend"} <= services

        await self.backend.until(is_complete)
        return of(trace_id)

    async def check(self, trace_id: str, status: str, *names: str) -> list[Span]:
        """The RPC's span must have that status, and its children must account for its time."""
        spans = await self.spans(trace_id, *names)
        (rpc,) = (s for s in spans if s.name == RPC and s.service == "blockyard-frontend")
        (request,) = (s for s in spans if s.name == "llm_request")
        assert rpc.attributes["rpc.response.status_code"] == status
        assert request.attributes["blockyard.status"] == status
        children = [span for span in spans if span.parent_id == request.span_id]
        assert covered_share(request, children) >= 0.99, (request, children)
        return spans


def _sampled_context() -> trace.SpanContext:
    return trace.SpanContext(
        secrets.randbits(128) | 1,
        secrets.randbits(64) | 1,
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )


@contextlib.contextmanager
def application_traces(endpoint: str) -> Iterator[None]:
    """Give this process, the client's, a tracer provider; the global one can be set only once."""
    provider = TracerProvider(resource=Resource({"service.name": "client"}))
    exporter = OTLPSpanExporter(endpoint, insecure=True)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer", provider.get_tracer)
        yield
    provider.shutdown()


@pytest_asyncio.fixture(scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    envoy, rotel = need(ENVOY), need(ROTEL)
    directory = tmp_path_factory.mktemp("mesh")
    otlp, http, back, port = (free_port() for _ in range(4))
    backend = TraceCollector(f"127.0.0.1:{back}")
    await backend.start()
    collector = [rotel, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{otlp}"]
    collector += ["--otlp-http-endpoint", f"127.0.0.1:{http}", "--exporter", "otlp"]
    collector += ["--otlp-exporter-endpoint", f"http://127.0.0.1:{back}"]
    collector += ["--batch-timeout", "100ms"]
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(running_peer(directory, "rotel", collector, otlp))
        _, processes, address = await stack.enter_async_context(
            traced_system(directory, f"127.0.0.1:{otlp}")
        )
        config = directory / "envoy.json"
        config.write_text(json.dumps(envoy_config(port, address, otlp)))
        proxy = [envoy, "-c", config, "--concurrency", 1, "--disable-hot-restart"]
        await stack.enter_async_context(running_peer(directory, "envoy", proxy, port))
        stack.enter_context(application_traces(f"127.0.0.1:{otlp}"))
        mesh = Mesh(f"127.0.0.1:{port}", processes, backend)
        async with mesh.client:
            yield mesh
    await backend.stop()


async def test_one_trace_leads_from_the_client_to_the_executor(mesh: Mesh) -> None:
    trace_id, status = await mesh.generate(40)
    assert status == "OK"
    everybody = {"client", "envoy", *OURS}
    await mesh.backend.until(
        lambda: everybody <= {span.service for span in mesh.backend.of(trace_id)}
    )
    spans = await mesh.check(trace_id, "OK", "decode", "executor.step", "stream")
    assert {span.service for span in spans} == everybody
    by_id = {span.span_id: span for span in spans}
    step = next(span for span in spans if span.name == "executor.step")
    path = [step]
    while path[-1].parent_id in by_id:
        path.append(by_id[path[-1].parent_id])
    assert [(span.service, span.name) for span in path if span.service != "envoy"] == [
        ("blockyard-executor", "executor.step"),
        ("blockyard-engine", "prefill.chunk"),
        ("blockyard-engine", "prefill"),
        ("blockyard-frontend", "llm_request"),
        ("blockyard-frontend", RPC),
        ("client", RPC),
    ]
    assert [span.service for span in path].index("envoy") == len(path) - 2
    # Engine and executor account for the whole time, too, not only who waited for them.
    (rpc,) = (s for s in spans if s.name == RPC and s.service == "blockyard-frontend")
    named = {span.name: span for span in spans}
    phases = [named[name] for name in ("tokenize", "queue", "prefill", "decode")]
    assert covered_share(rpc, [*phases, named["stream"]]) >= 0.99
    assert named["executor.step"].attributes["blockyard.step.forward_ns"] > 0


async def test_a_cancelled_request(mesh: Mesh) -> None:
    context = _sampled_context()
    with trace.use_span(trace.NonRecordingSpan(context)):
        chunks = mesh.client.generate(token_ids=PROMPT, max_tokens=300, ignore_eos=True)
        await anext(chunks)
        await chunks.aclose()
    spans = await mesh.check(f"{context.trace_id:032x}", "CANCELLED", "decode")
    (seen,) = (s for s in spans if s.service == "client")
    assert seen.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_a_deadline(mesh: Mesh) -> None:
    trace_id, status = await mesh.generate(300, timeout_s=0.4)
    spans = await mesh.check(trace_id, "DEADLINE_EXCEEDED", "decode")
    (seen,) = (s for s in spans if s.service == "client")
    assert seen.attributes["rpc.response.status_code"] == status == "DEADLINE_EXCEEDED"


async def test_refused_requests(mesh: Mesh) -> None:
    trace_id, status = await mesh.generate(MAX_MODEL_LEN)
    assert status == "INVALID_ARGUMENT"
    await mesh.check(trace_id, status)
    # More than can run or wait, at once.
    ends = await asyncio.gather(*(mesh.generate(100, cache_off=True) for _ in range(20)))
    assert {"OK", "RESOURCE_EXHAUSTED"} == {status for _, status in ends}
    for trace_id, status in ends:
        await mesh.check(trace_id, status, *(["decode"] if status == "OK" else []))


async def test_a_request_that_fails_alone(mesh: Mesh) -> None:
    trace_id, status = await mesh.generate(10, seed=NAN_SEED)
    assert status == "INTERNAL"
    spans = await mesh.check(trace_id, status, "queue")
    assert any(span.is_error for span in spans if span.service == "blockyard-engine")


async def test_a_lost_executor(mesh: Mesh) -> None:
    running = asyncio.create_task(mesh.generate(100, cache_off=True))
    await asyncio.sleep(0.5)
    await mesh.processes.executor.restart()
    trace_id, status = await running
    assert status == "OK"
    spans = await mesh.check(trace_id, "OK", "decode")
    (decode,) = (span for span in spans if span.name == "decode")
    assert "recovery" in {event.name for event in decode.events}


async def test_a_request_that_no_executor_survives(mesh: Mesh) -> None:
    running = asyncio.create_task(mesh.generate(10, seed=FATAL_SEED))
    executor, num_starts = mesh.processes.executor, mesh.processes.executor.num_starts
    while not running.done():
        ended = asyncio.create_task(executor.exit_code())
        await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await executor.start()
        else:
            ended.cancel()
    trace_id, status = await running
    assert executor.num_starts - num_starts > 1
    spans = await mesh.check(trace_id, status, "queue")
    assert status == "INTERNAL"
    assert any(span.is_error for span in spans if span.service == "blockyard-engine")
    recoveries = [e for span in spans for e in span.events if e.name == "recovery"]
    assert recoveries
    assert (await mesh.generate(5))[1] == "OK"


async def test_a_malformed_header_hurts_nobody(mesh: Mesh) -> None:
    """Sent by a client of another make, past the proxy's own idea of a trace."""
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        call: Any = channel.unary_unary("/blockyard.v1.GenerateService/GetModel")
        for header in ("", "00-xyz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff" * 500):
            assert await call(b"", metadata=(("traceparent", header), ("tracestate", "=,=;" * 99)))

"""`make mesh-demo`: the system of compose.yaml as processes; asks one question through Envoy."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from pathlib import Path
from typing import Final

import click
from opentelemetry import trace

from blockyard.client import AsyncClient
from blockyard.models import store
from blockyard.models.errors import ModelImportError
from integration_tests.mesh.tools import ToolUnavailableError
from integration_tests.mesh.topology import Topology, running_topology

_QUESTION: Final = "In one short paragraph: why does a computer page its memory?"
_SERVICES: Final = frozenset(
    {"envoy", "blockyard-frontend", "blockyard-engine", "blockyard-executor"}
)
_MAX_TOKENS: Final = 120
_CHECK_TIMEOUT_S: Final = 30.0


@click.command()
@click.argument("question", default=_QUESTION)
@click.option("--model", default=store.DEFAULT_MODEL, show_default=True, help="Name or path.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Of the API, on 127.0.0.1; default: a free one.",
)
@click.option("--check", is_flag=True, help="End once trace and metrics of the answer are there.")
def main(question: str, model: str, port: int, *, check: bool) -> None:
    """Start everything, ask QUESTION, say where to look, and run until Ctrl-C."""
    click.echo("starting Envoy, front ends, engine, executor, collector, Prometheus ...", err=True)
    try:
        asyncio.run(_demo(store.resolve(model), question, port, check=check))
    except (ModelImportError, ToolUnavailableError, AssertionError) as error:
        raise click.ClickException(str(error)) from error


async def _demo(model: Path, question: str, port: int, *, check: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="mesh-demo-") as directory:
        async with running_topology(Path(directory), model, port=port) as topology:
            trace_id = await _ask(topology.api, question)
            _show(topology, trace_id)
            if check:
                await _check(topology, trace_id)
            else:
                click.echo("Ctrl-C stops everything", err=True)
                await asyncio.Event().wait()


async def _ask(address: str, question: str) -> str:
    """Stream the answer to the terminal; returns the trace id."""
    context = trace.SpanContext(
        secrets.randbits(128) | 1,
        secrets.randbits(64) | 1,
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    async with AsyncClient(address) as client:
        model = await client.model()
        click.echo(f"\n{model.name}> {question}\n")
        if model.has_chat_template:
            chunks = client.generate(
                messages=[{"role": "user", "content": question}], max_tokens=_MAX_TOKENS
            )
        else:
            chunks = client.generate(question, max_tokens=_MAX_TOKENS)
        with trace.use_span(trace.NonRecordingSpan(context)):
            async for chunk in chunks:
                click.echo(chunk.text, nl=False)
    click.echo("\n")
    return trace.format_trace_id(context.trace_id)


def _show(topology: Topology, trace_id: str) -> None:
    graph = f"http://{topology.prometheus}/graph?g0.expr="
    for what, where in (
        ("API (Envoy)", topology.api),
        ("", f"blockyard generate --address {topology.api} Hello"),
        ("front ends", " ".join(topology.frontends)),
        ("Envoy's page", f"http://{topology.envoy_admin}"),
        ("metrics", f"http://{topology.metrics}/metrics"),
        ("Prometheus", graph + "rate(vllm:generation_tokens_total[1m])"),
        ("alerts", f"http://{topology.prometheus}/alerts"),
        ("collector", f"{topology.collector} (OTLP over gRPC)"),
        ("trace", f"grep -A4 {trace_id} {topology.collector_log}"),
        ("logs", str(topology.directory)),
    ):
        click.echo(f"{what:14} {where}")


async def _check(topology: Topology, trace_id: str) -> None:
    """Wait until the answer can be seen in trace and metrics. Raises AssertionError."""
    services: set[str] = set()
    num_tokens = 0.0
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            while not (services >= _SERVICES and num_tokens):
                await asyncio.sleep(0.2)
                services = {service for service, _ in topology.spans(trace_id)}
                for series in await topology.query("vllm:generation_tokens_total"):
                    num_tokens = float(series["value"][1])
    except TimeoutError as error:
        missing = ", ".join(sorted(_SERVICES - services)) or "none"
        raise AssertionError(
            f"no spans of: {missing}; output tokens that Prometheus knows of: {num_tokens:g}"
        ) from error
    click.echo(f"checked: one trace through {', '.join(sorted(services))}; metrics are scraped")


if __name__ == "__main__":
    main()

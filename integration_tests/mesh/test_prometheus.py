"""A real Prometheus scrapes `blockyard serve` under load; a real collector takes the rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio

from blockyard.models import store
from blockyard.models.tests.tiny_gguf import TinyGguf
from blockyard.v1 import generate_pb2 as pb
from integration_tests.harness import Process
from integration_tests.mesh.peer import free_port, running_peer
from integration_tests.mesh.tools import PROMETHEUS, PROMTOOL, ROTEL, need
from integration_tests.metric_collector import MetricCollector
from integration_tests.public_client import PublicClient
from scheduler_svc.engine.metrics.families import FAMILIES, exported_names
from scheduler_svc.telemetry import buckets

TIMEOUT_S: Final = 20.0
TRACE_ID: Final = secrets.token_hex(16)
NEVER_HERE: Final = {
    # The tiny model's requests are too quick for a queue by deadline, and its clients read.
    "blockyard_expired_requests_total",
    "blockyard_slow_readers_total",
    "blockyard_recoveries_total",
}
"""Counters that this load leaves at 0; other tests count them."""


class Watched:
    """The server's endpoint, and the Prometheus that scrapes it."""

    def __init__(self, metrics_port: int, prometheus_port: int) -> None:
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._api = f"http://127.0.0.1:{prometheus_port}/api/v1"

    async def query(self, expression: str, path: str = "query", **more: str) -> list[Any]:
        """The result of an API call with this expression."""
        query = urllib.parse.urlencode({"query": expression, **more})
        answer = json.loads(await _get(f"{self._api}/{path}?{query}"))
        assert answer["status"] == "success", answer
        data = answer["data"]
        return list(data["result"] if path == "query" else data)

    async def total(self, name: str) -> float:
        """Sum of all series of a name; -1 if there are none."""
        series = await self.query(f"sum({name})")
        return float(series[0]["value"][1]) if series else -1.0


async def _get(url: str, **headers: str) -> str:
    def get() -> str:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)


@contextlib.asynccontextmanager
async def serving(directory: Path, metrics_port: int, otlp_port: int) -> AsyncIterator[str]:
    """`blockyard serve` with two front ends and little memory; yields its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKYARD_HOME", str(directory))
        model = store.resolve(str(TinyGguf().write(directory / "tiny.gguf")), is_quiet=True)
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        *(Path(sys.executable).parent / "blockyard", "serve", "--model", model),
        *("--listen", address, "--metrics-address", f"127.0.0.1:{metrics_port}"),
        *("--kv-memory", "448KiB", "--host-memory", "256KiB", "--frontends", 2),
        *("--num-threads", 1, "--device", "cpu", "--preemption", "swap"),
        *("--otlp-endpoint", f"127.0.0.1:{otlp_port}", "--trace-sample-ratio", 0),
    ]
    process = Process(directory, "serve", command)
    await process.start()
    try:
        async with PublicClient(address) as client:
            await client.serving()
        yield address
    finally:
        await process.stop()


async def load(address: str, until_s: float) -> None:
    """Streams that share, that fork, that are traced, cancelled, and refused, until that time."""

    async def one(number: int, client: PublicClient) -> None:
        while time.monotonic() < until_s:
            prompt = [*range(20, 60), *[20 + secrets.randbelow(200) for _ in range(20)]]
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt),
                sampling=pb.SamplingParams(temperature=1.0),
                stop=pb.StopConditions(max_tokens=80, ignore_eos=True),
                num_samples=1 + number % 2,
            )
            span_id = secrets.token_hex(8)
            metadata = (("traceparent", f"00-{TRACE_ID}-{span_id}-0{number % 2}"),)
            call = client.stub.Generate(request, metadata=metadata)
            num_messages = 0
            async for _ in call:
                num_messages += 1
                if number == 0 and num_messages == 5:
                    call.cancel()
                    break
            refused = await client.generate(prompt, 10_000)
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(PublicClient(address)) for _ in range(12)]
        await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))


@pytest_asyncio.fixture(scope="module")
async def watched(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Watched, MetricCollector]]:
    """Everything up, and a load that goes on."""
    prometheus, rotel = need(PROMETHEUS), need(ROTEL)
    directory = tmp_path_factory.mktemp("prometheus")
    metrics_port, web_port, otlp, http, back = (free_port() for _ in range(5))
    behind = MetricCollector(f"127.0.0.1:{back}")
    config = {
        "global": {"scrape_interval": "500ms"},
        "scrape_configs": [
            {
                "job_name": "blockyard",
                "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}],
            }
        ],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))
    command = [
        *(prometheus, f"--config.file={directory}/prometheus.yml"),
        *(f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{web_port}"),
        "--enable-feature=exemplar-storage",
    ]
    collector = [rotel, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{otlp}"]
    collector += ["--otlp-http-endpoint", f"127.0.0.1:{http}", "--exporter", "otlp"]
    collector += ["--otlp-exporter-endpoint", f"http://127.0.0.1:{back}"]
    collector += ["--batch-timeout", "100ms"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
        async with (
            behind,
            running_peer(directory, "rotel", collector, otlp),
            running_peer(directory, "prometheus", command, web_port),
            serving(directory, metrics_port, otlp) as address,
        ):
            loading = asyncio.create_task(load(address, time.monotonic() + 4))
            yield Watched(metrics_port, web_port), behind
            await loading


async def test_every_name_has_data_under_load(watched: tuple[Watched, MetricCollector]) -> None:
    prometheus, _ = watched
    moving = {
        name
        for family in FAMILIES
        for name in family.sample_names
        if family.type != "gauge" and name not in NEVER_HERE
    }
    still = set(moving)
    end_s = time.monotonic() + TIMEOUT_S
    while still and time.monotonic() < end_s:
        await asyncio.sleep(0.5)
        still = {name for name in still if await prometheus.total(name) <= 0}
    assert not still
    absent = {name for name in exported_names() if await prometheus.total(name) < 0}
    assert not absent


async def test_labels_are_those_that_others_group_by(
    watched: tuple[Watched, MetricCollector],
) -> None:
    prometheus, _ = watched
    for expression in (
        'vllm:num_requests_waiting_by_reason{reason="capacity"}',
        'vllm:request_success_total{finished_reason="length"}',
        'vllm:cache_config_info{block_size="16", num_gpu_blocks=~"[1-9].*"}',
        "histogram_quantile(0.9, sum by (le, model_name) "
        "(rate(vllm:e2e_request_latency_seconds_bucket[1m])))",
        'sum by (pool) (blockyard_kv_slots) and on (pool) blockyard_kv_slots{class="free"}',
        'rate(blockyard_device_seconds_total{phase="idle"}[1m]) / ignoring(phase) group_left '
        "sum without(phase) (rate(blockyard_device_seconds_total[1m]))",
    ):
        assert await prometheus.query(expression), expression


async def test_exemplars_lead_to_the_client_s_trace(
    watched: tuple[Watched, MetricCollector],
) -> None:
    prometheus, _ = watched
    for name in ("vllm:time_to_first_token_seconds", "vllm:request_inference_time_seconds"):
        found: list[Any] = []
        async with asyncio.timeout(TIMEOUT_S):
            while not found:
                await asyncio.sleep(0.2)
                now_s = time.time()
                window = {"start": str(now_s - 300), "end": str(now_s)}
                found = await prometheus.query(f"{name}_bucket", "query_exemplars", **window)
        ids = {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}
        assert ids == {TRACE_ID}


async def test_promtool_finds_nothing_but_the_names_that_are_vllm_s(
    watched: tuple[Watched, MetricCollector],
) -> None:
    body = await _get(watched[0].metrics_url)
    command = [str(need(PROMTOOL)), "check", "metrics"]

    def check() -> list[str]:
        done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=30)
        return (done.stdout + done.stderr).splitlines()

    complaints = await asyncio.to_thread(check)
    assert complaints  # it does not like colons
    assert {line.split(":")[0] for line in complaints} == {"vllm"}, complaints


async def test_the_conventions_metrics_reach_a_collector(
    watched: tuple[Watched, MetricCollector],
) -> None:
    _, collector = watched
    bounds = {
        "gen_ai.server.request.duration": buckets.GEN_AI_REQUEST_DURATION,
        "gen_ai.server.time_to_first_token": buckets.GEN_AI_TIME_TO_FIRST_TOKEN,
        "gen_ai.server.time_per_output_token": buckets.GEN_AI_TIME_PER_OUTPUT_TOKEN,
    }
    await collector.until(
        lambda points: {p.name for p in points if p.trace_ids == {TRACE_ID}} == set(bounds)
    )
    for point in collector.points:
        assert point.service == "blockyard-frontend"
        assert tuple(point.bounds) == bounds[point.name]
        assert point.attributes["gen_ai.provider.name"] == "blockyard"
        assert point.attributes["gen_ai.operation.name"] == "text_completion"
    errors = {point.attributes.get("error.type") for point in collector.points}
    assert errors >= {None, "TOO_LONG", "CANCELLED"}

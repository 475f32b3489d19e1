"""The system of compose.yaml as plain processes on free ports of this machine.

Engine, executor and front ends run with the flags that compose.yaml gives them; Envoy and
Prometheus with their files in deploy/. rotel stands in for the collector, and keeps the traces.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blockyard.launcher.watch import wait_until_serving
from integration_tests.harness import Process
from integration_tests.mesh import deployment, tools
from integration_tests.mesh.peer import free_port, running_peer

NUM_FRONTENDS: Final = 2
_START_TIMEOUT_S: Final = 180.0
"""The first start compiles the kernels."""
_SPAN_LINE: Final = re.compile(r"\s*(?:-> (service\.name): Str|(Trace ID|Name)\s+: )(.*)")


@dataclass(frozen=True, slots=True)
class Topology:
    """What runs; addresses are host:port."""

    directory: Path
    """Of logs."""
    api: str
    """Envoy's, in front of the front ends."""
    frontends: tuple[str, ...]
    envoy_admin: str
    metrics: str
    """The engine's: GET /metrics."""
    prometheus: str
    collector: str
    """Takes OTLP over gRPC."""

    @property
    def collector_log(self) -> Path:
        """Where every span that was collected is written."""
        return self.directory / "rotel.log"

    def spans(self, trace_id: str) -> set[tuple[str, str]]:
        """Service and name of the spans of one trace that were collected so far."""
        found, service, current = set(), "", ""
        for line in self.collector_log.read_text(encoding="utf-8").splitlines():
            if (match := _SPAN_LINE.fullmatch(line)) is None:
                continue
            if match[1]:
                service = match[3].strip("()")
            elif match[2] == "Trace ID":
                current = match[3]
            elif current == trace_id:
                found.add((service, match[3]))
        return found

    async def query(self, expression: str) -> list[Any]:
        """What Prometheus answers: series with their newest values."""
        answer = await self.get(self.prometheus, "/api/v1/query", query=expression)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    async def get(self, address: str, path: str, **parameters: str) -> Any:
        """A JSON answer over HTTP."""
        url = f"http://{address}{path}?{urllib.parse.urlencode(parameters)}"

        def get() -> Any:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)

        return await asyncio.to_thread(get)


@contextlib.asynccontextmanager
async def running_topology(
    directory: Path, model: Path, *, port: int = 0, interval: str = ""
) -> AsyncIterator[Topology]:
    """Start everything; returns when Envoy finds both front ends healthy.

    Args:
        directory: for sockets, configurations and logs.
        model: a model directory.
        port: of the API; 0: a free one.
        interval: of Prometheus; empty: as deployed.

    Raises ToolUnavailableError, or AssertionError with the log of a process that did not start.
    """
    found = {
        tool: await asyncio.to_thread(tools.find, tool)
        for tool in (tools.ENVOY, tools.PROMETHEUS, tools.ROTEL)
    }
    api, admin, web, metrics, otlp, otlp_http = (free_port() for _ in range(6))
    api = port or api
    ports = [free_port() for _ in range(NUM_FRONTENDS)]
    places = {
        "/run/blockyard": str(directory / "run"),
        "/model": str(model),
        "0.0.0.0:9464": f"127.0.0.1:{metrics}",
        "otel-collector:4317": f"127.0.0.1:{otlp}",
    }
    (directory / "run").mkdir(mode=0o700)
    envoy_clusters = {"frontend": ports, "otel-collector": [otlp]}
    envoy_config = deployment.envoy_config(api, admin, envoy_clusters)
    (directory / "envoy.json").write_text(json.dumps(envoy_config))
    prometheus_config = deployment.prometheus_config(metrics, interval)
    (directory / "prometheus.yml").write_text(json.dumps(prometheus_config))
    rotel = [
        *(found[tools.ROTEL], "start", "--exporter", "blackhole"),
        *("--otlp-grpc-endpoint", f"127.0.0.1:{otlp}"),
        *("--otlp-http-endpoint", f"127.0.0.1:{otlp_http}"),
        *("--debug-log", "traces", "--debug-log-verbosity", "detailed"),
    ]
    envoy = [
        *(found[tools.ENVOY], "-c", directory / "envoy.json", "--concurrency", 1),
        *("--disable-hot-restart", "--log-level", "warning"),
    ]
    prometheus = [
        *(found[tools.PROMETHEUS], f"--config.file={directory}/prometheus.yml"),
        *(f"--storage.tsdb.path={directory}/prometheus", "--enable-feature=exemplar-storage"),
        f"--web.listen-address=127.0.0.1:{web}",
    ]
    async with (
        running_peer(directory, "rotel", rotel, otlp),
        _running_services(directory, places, ports),
        running_peer(directory, "envoy", envoy, api),
        running_peer(directory, "prometheus", prometheus, web),
    ):
        topology = Topology(
            directory,
            api=f"127.0.0.1:{api}",
            frontends=tuple(f"127.0.0.1:{each}" for each in ports),
            envoy_admin=f"127.0.0.1:{admin}",
            metrics=f"127.0.0.1:{metrics}",
            prometheus=f"127.0.0.1:{web}",
            collector=f"127.0.0.1:{otlp}",
        )
        async with asyncio.timeout(_START_TIMEOUT_S):
            while await _num_healthy(topology) < NUM_FRONTENDS:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield topology


async def _num_healthy(topology: Topology) -> int:
    """How many front ends Envoy sends calls to."""
    clusters = await topology.get(topology.envoy_admin, "/clusters", format="json")
    (frontends,) = (each for each in clusters["cluster_statuses"] if each["name"] == "frontend")
    statuses = [host["health_status"] for host in frontends.get("host_statuses", ())]
    return sum(not status.get("failed_active_health_check", False) for status in statuses)


@contextlib.asynccontextmanager
async def _running_services(
    directory: Path, places: Mapping[str, str], ports: list[int]
) -> AsyncIterator[None]:
    """Executor, engine and front ends as compose.yaml has them; returns when they serve."""

    def process(name: str, service: str, places: Mapping[str, str]) -> Process:
        words = deployment.service_words(service)
        for deployed, here in places.items():
            words = [word.replace(deployed, here) for word in words]
        command = [sys.executable, "-m", *words, "--exit-with-parent"]
        return Process(directory, name, command)

    processes = [
        process("executor", "executor-cpu", places),
        process("engine", "engine", places),
        *(
            process(f"frontend-{i}", "frontend", {**places, "0.0.0.0:50051": f"127.0.0.1:{port}"})
            for i, port in enumerate(ports)
        ),
    ]
    try:
        for each in processes:
            await each.start()
        await _serving(processes, ports)
        yield
    finally:
        for each in reversed(processes):
            await each.kill()


async def _serving(processes: Sequence[Process], ports: Sequence[int]) -> None:
    """Wait for the front ends. Raises AssertionError if a process ends, or none gets on."""

    async def watch(process: Process) -> None:
        code = await process.exit_code()
        raise AssertionError(f"exit code {code}:\n{process.log()}")

    async def serve() -> None:
        await asyncio.gather(*(wait_until_serving(f"127.0.0.1:{port}") for port in ports))

    tasks = [asyncio.create_task(work) for work in (serve(), *map(watch, processes))]
    try:
        done, _ = await asyncio.wait(
            tasks, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise AssertionError("not ready in time:\n" + "\n".join(p.log() for p in processes))
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

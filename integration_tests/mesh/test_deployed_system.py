"""The system of compose.yaml as processes: under load, dashboard and alerts have their data."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio

from blockyard.models import store
from blockyard.models.tests.tiny_gguf import TinyGguf
from blockyard.v1 import generate_pb2 as pb
from integration_tests.mesh import deployment
from integration_tests.mesh.tools import ENVOY, PROMETHEUS, ROTEL, need
from integration_tests.mesh.topology import Topology, running_topology
from integration_tests.public_client import PublicClient

pytestmark = pytest.mark.timeout(120)

TIMEOUT_S: Final = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in (ENVOY, PROMETHEUS, ROTEL):
        need(tool)
    directory = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKYARD_HOME", str(directory))
        return store.resolve(str(TinyGguf().write(directory / "tiny.gguf")), is_quiet=True)


async def test_the_demo_answers_and_leaves_trace_and_metrics(model: Path) -> None:
    command = [sys.executable, "-m", "integration_tests.mesh.demo", "--check", "--model", model]
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=deployment.ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    assert "checked: one trace through blockyard-engine, blockyard-executor" in said


async def load(address: str, ended: asyncio.Event) -> None:
    """Streams through Envoy, some with two samples, some refused."""

    async def one(number: int, client: PublicClient) -> None:
        while not ended.is_set():
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[*range(20, 60), 60 + number]),
                sampling=pb.SamplingParams(temperature=1.0),
                stop=pb.StopConditions(max_tokens=60, ignore_eos=True),
                num_samples=1 + number % 2,
            )
            async for _ in client.stub.Generate(request):
                pass
            refused = await client.generate([1], 10_000)
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(PublicClient(address)) for _ in range(8)]
        await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))


@pytest_asyncio.fixture(scope="module")
async def loaded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Topology]:
    directory = tmp_path_factory.mktemp("deployed")
    async with running_topology(directory, model, interval="500ms") as topology:
        ended = asyncio.Event()
        loading = asyncio.create_task(load(topology.api, ended))
        try:
            yield topology
        finally:
            ended.set()
            await loading


async def without_data(topology: Topology, expressions: Mapping[str, str]) -> set[str]:
    """Those of the named expressions that never have a number while the load goes on."""
    missing = set(expressions)
    deadline_s = time.monotonic() + TIMEOUT_S
    while missing and time.monotonic() < deadline_s:
        await asyncio.sleep(0.5)
        for name in sorted(missing):
            values = [float(s["value"][1]) for s in await topology.query(expressions[name])]
            if any(math.isfinite(value) for value in values):
                missing.discard(name)
    return missing


async def test_every_query_of_the_dashboard_has_data(loaded: Topology) -> None:
    queries = deployment.dashboard_queries()
    assert len(queries) >= 60
    assert not await without_data(loaded, queries)


async def test_every_alert_has_something_to_watch(loaded: Topology) -> None:
    assert not await without_data(loaded, deployment.alert_values())
    rules: list[dict[str, Any]] = []
    async with asyncio.timeout(TIMEOUT_S):
        while not rules or any(rule["health"] == "unknown" for rule in rules):
            await asyncio.sleep(0.2)
            groups = (await loaded.get(loaded.prometheus, "/api/v1/rules"))["data"]["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(deployment.alert_values())
    assert {(rule["name"], rule["health"], rule["state"]) for rule in rules} == {
        (rule["name"], "ok", "inactive") for rule in rules
    }


async def test_calls_are_spread_over_both_front_ends(loaded: Topology) -> None:
    clusters = await loaded.get(loaded.envoy_admin, "/clusters", format="json")
    (frontends,) = (each for each in clusters["cluster_statuses"] if each["name"] == "frontend")
    calls = [
        int(stat["value"])
        for host in frontends["host_statuses"]
        for stat in host["stats"]
        if stat["name"] == "rq_success"
    ]
    assert len(calls) == 2
    assert min(calls) >= 0.25 * max(calls) > 0, calls

"""One endpoint over real processes: what front ends count arrives, whatever becomes of them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import grpc
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from blockyard.v1 import generate_pb2 as pb
from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.mesh.peer import free_port
from integration_tests.public_client import PublicClient

VOCAB_SIZE: Final = 400
TIMEOUT_S: Final = 30.0
Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]


class Scraped:
    """An engine, its front ends, and what the engine says of all of them."""

    def __init__(self, processes: Processes, port: int, addresses: list[str]) -> None:
        self.processes, self._port = processes, port
        self.clients = [PublicClient(address) for address in addresses]

    async def scrape(self) -> Samples:
        """All samples, without the labels that all have."""
        body = (await self.read()).partition("\r\n\r\n")[2]
        return {
            (sample.name, frozenset(sample.labels.items() - _COMMON)): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

    async def read(self) -> str:
        """What the endpoint answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        return answer

    async def value(self, name: str, **labels: str) -> float:
        """Of one series; 0 if it is not there yet."""
        return (await self.scrape()).get((name, frozenset(labels.items())), 0.0)

    async def reaches(self, wanted: float, name: str, **labels: str) -> None:
        """Wait until a series has this value. Raises TimeoutError."""
        await self.becomes(lambda value: value == wanted, name, **labels)

    async def becomes(self, holds: Callable[[float], bool], name: str, **labels: str) -> None:
        """Wait until it holds of a series' value. Raises TimeoutError."""
        async with asyncio.timeout(TIMEOUT_S):
            while not holds(await self.value(name, **labels)):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)


_COMMON: Final = {("model_name", "fake"), ("engine", "0")}


@pytest_asyncio.fixture(scope="module")
async def scraped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scraped]:
    """Two front ends; the executor's host pool makes preemption swap."""
    directory, port = tmp_path_factory.mktemp("metrics"), free_port()
    processes = Processes(
        directory,
        executor_flags=(
            *("--num-device-blocks", 64, "--num-host-blocks", 64, "--block-size", 8),
            *("--vocab-size", VOCAB_SIZE, "--max-model-len", 1000, "--step-ms", 4),
        ),
        engine_flags=(
            *("--strict", "--preemption", "swap"),
            *("--metrics-address", f"127.0.0.1:{port}"),
        ),
    )
    model = fake_model_dir(directory / "model", VOCAB_SIZE)
    pairs = [processes.add_frontend(model, "--lame-duck-s", 0) for _ in range(2)]
    async with asyncio.timeout(120), running(processes):
        for frontend, _ in pairs:
            await frontend.start()
        system = Scraped(processes, port, [address for _, address in pairs])
        for client in system.clients:
            await client.serving()
        yield system
        for client in system.clients:
            await client.__aexit__(None, None, None)


async def test_front_ends_add_up_and_take_no_counts_along(scraped: Scraped) -> None:
    await scraped.reaches(2, "blockyard_frontends")
    for number, client in enumerate(scraped.clients):
        answers = [await client.generate([7, 8, 9], 5) for _ in range(2 + number)]
        assert {answer.code for answer in answers} == {grpc.StatusCode.OK}
    ok = {"method": "Generate", "code": "OK", "reason": ""}
    leaving = scraped.processes.frontends[0]
    assert await leaving.stop() == 0  # its last report comes before its exit
    await scraped.reaches(5, "blockyard_rpcs_total", **ok)
    samples = await scraped.scrape()
    none: Labels = frozenset()
    assert samples["blockyard_frontends", none] == 1
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds"):
        assert samples[f"vllm:{name}_count", none] == 5
    for name in ("request_inference_time_seconds", "request_generation_tokens"):
        assert samples[f"vllm:{name}_count", none] == 5
    assert samples["vllm:request_generation_tokens_sum", none] == 25
    assert samples["vllm:inter_token_latency_seconds_count", none] == 20
    assert samples["blockyard_stream_tokens_total", none] == 25
    length = frozenset({("finished_reason", "length")})
    assert samples["vllm:request_success_total", length] == 5
    await leaving.start()
    await scraped.reaches(2, "blockyard_frontends")
    assert await scraped.value("blockyard_rpcs_total", **ok) == 5


async def test_every_process_is_seen(scraped: Scraped) -> None:
    for process in ("engine", "frontend", "executor"):
        await scraped.becomes(bool, "blockyard_process_cpu_seconds_total", process=process)
        memory = await scraped.value("blockyard_process_resident_bytes", process=process)
        assert memory > 10 << 20


async def test_preemptions_cost_time_and_a_lost_executor_is_not_ready(scraped: Scraped) -> None:
    client = scraped.clients[1]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(1, 100)),
        stop=pb.StopConditions(max_tokens=100, ignore_eos=True),
        cache=pb.PrefixCache(off=True),
    )
    calls = [client.stub.GenerateUnary(request) for _ in range(6)]
    await scraped.becomes(bool, "blockyard_swapped_in_blocks_total")
    await scraped.processes.executor.kill()
    await scraped.reaches(0, "blockyard_executor_ready")
    await scraped.processes.executor.start()
    await asyncio.wait_for(asyncio.gather(*calls), TIMEOUT_S)
    samples = await scraped.scrape()
    none: Labels = frozenset()
    for name in (
        "blockyard_swapped_out_blocks_total",
        "blockyard_swap_seconds_total",
        "blockyard_recomputed_tokens_total",
        "blockyard_recompute_seconds_total",
    ):
        assert samples[name, none] > 0, name
    assert samples["blockyard_executor_ready", none] == 1
    assert samples["blockyard_recoveries_total", none] == 1
    for pool, size in (("device", 64 * 8), ("host", 64 * 8)):
        classes = [
            value
            for (name, labels), value in samples.items()
            if name == "blockyard_kv_slots" and ("pool", pool) in labels
        ]
        assert sum(classes) == size


async def test_scrapers_that_are_slow_or_many_do_not_slow_streams(scraped: Scraped) -> None:
    client = scraped.clients[1]

    async def long_gap_s() -> float:
        gaps, last = [], time.monotonic()
        async for _ in client.start([5, 6], 150):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        return sorted(gaps)[-15]  # the machine has other things to do as well

    quiet_s = await long_gap_s()
    silent = [socket.create_connection(("127.0.0.1", scraped._port)) for _ in range(40)]
    for each in silent[:20]:
        each.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    for each in silent[20:30]:
        each.sendall(b"\xff" * 9000)

    async def scrape_on() -> None:
        while True:
            assert "vllm:" in await scraped.read()
            await asyncio.sleep(0.02)

    scraping = asyncio.create_task(scrape_on())
    noisy_s = await long_gap_s()
    scraping.cancel()
    for each in silent:
        each.close()
    assert noisy_s < quiet_s + 0.05


async def test_a_taken_port_leaves_serving_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        processes = Processes(
            tmp_path,
            executor_flags=("--vocab-size", VOCAB_SIZE, "--step-ms", 1),
            engine_flags=("--metrics-address", address),
        )
        model = fake_model_dir(tmp_path / "model", VOCAB_SIZE)
        frontend, target = processes.add_frontend(model)
        async with asyncio.timeout(TIMEOUT_S), running(processes), PublicClient(target) as client:
            await frontend.start()
            await client.serving()
            assert (await client.generate([7, 8], 3)).code is grpc.StatusCode.OK
            assert f"metrics: cannot listen on {address}" in processes.engine.log()

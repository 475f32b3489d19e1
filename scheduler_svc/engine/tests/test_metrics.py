"""The scrape: bad input first, then what the figures say."""

from __future__ import annotations

import asyncio
import pathlib
import re
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockyard.common.listen_address import ListenError
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine import metrics
from scheduler_svc.engine.metrics import serve_metrics

ROOT = pathlib.Path(__file__).parents[3]
ANYWHERE = "127.0.0.1:0"

SNAPSHOT = pb.SnapshotResponse(
    num_waiting=3,
    num_running=5,
    block_size=16,
    device=pb.DevicePool(
        num_slots=1616,
        num_stored=700,
        num_in_flight=12,
        num_unused=88,
        num_cached=320,
        num_free=480,
        num_padding=16,
        num_saved_by_sharing=64,
    ),
    host=pb.HostPool(num_slots=160, num_swapped=48, num_cached=32, num_free=80),
    counters=pb.Counters(
        num_finished=101,
        num_recoveries=102,
        num_preemptions_by_recompute=103,
        num_preemptions_by_swap=104,
        num_queried_tokens=1000,
        num_hit_tokens_device=105,
        num_hit_tokens_host=106,
        num_evicted=107,
        num_copied=108,
        num_swapped_out=109,
        num_swapped_in=110,
        num_prompt_tokens=111,
        num_output_tokens=2**53,
        num_steps=113,
    ),
)


class FakeSource:
    """An engine whose state and snapshot the test sets."""

    def __init__(self, snapshot: pb.SnapshotResponse = SNAPSHOT, model: str = "tiny") -> None:
        self.shown = snapshot
        self.shown_state = pb.EngineState(ready=True, model_name=model)
        self.num_snapshots = 0

    def state(self) -> pb.EngineState:
        return self.shown_state

    def snapshot(self) -> pb.SnapshotResponse:
        self.num_snapshots += 1
        return self.shown


async def ask(address: str, request: bytes) -> tuple[int, str, str]:
    """Send bytes; returns status, head and body of the answer."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(request)
    answer = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head
    return int(head.split()[1]), head, body


async def scrape(source: FakeSource, headers: str = "") -> str:
    async with serve_metrics(source, ANYWHERE) as address:
        request = f"GET /metrics HTTP/1.1\r\nHost: h\r\n{headers}\r\n"
        status, head, body = await ask(address, request.encode())
    assert status == 200
    assert "Content-Type: text/plain; version=0.0.4" in head
    return body


Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def values(body: str) -> Values:
    """Samples by name and own labels; the labels that all have are checked and left out."""
    found = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            assert labels.pop("engine") == "0"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


# ---- bad input


@pytest.mark.parametrize("address", ["9464", "localhost", "host:port", "127.0.0.1:65536"])
def test_a_malformed_address_is_refused_with_the_settings(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        EngineSettings.parse(
            ["--listen", "unix:/a", "--executor", "unix:/b", "--metrics-address", address]
        )


async def test_a_taken_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=rf"{address}.*in use.*--metrics-address"):
            async with serve_metrics(FakeSource(), address):
                pass


@pytest.mark.parametrize("host", ["no..host", "203.0.113.1"])
async def test_a_host_that_is_not_here_is_one_clear_error(host: str) -> None:
    with pytest.raises(ListenError, match=f"metrics: cannot listen on {host}:0"):
        async with serve_metrics(FakeSource(), f"{host}:0"):
            pass


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics FTP/1.1\r\n\r\n", 400),
        (b"\xff\x00\xfe\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", 200),
    ],
)
async def test_requests_that_are_not_a_scrape(request_head: bytes, status: int) -> None:
    source = FakeSource()
    async with serve_metrics(source, ANYWHERE) as address:
        assert (await ask(address, request_head))[0] == status
    assert source.num_snapshots == (status == 200)


async def test_silent_and_vanishing_peers_do_not_keep_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_TIMEOUT_S", 0.2)
    async with serve_metrics(FakeSource(), ANYWHERE) as address:
        host, _, port = address.rpartition(":")
        reader, silent = await asyncio.open_connection(host, int(port))
        _, vanishing = await asyncio.open_connection(host, int(port))
        vanishing.write(b"GET /met")
        vanishing.transport.abort()
        assert (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == 200
        assert await asyncio.wait_for(reader.read(), 5) == b""  # the server hung up
        silent.close()


async def test_the_port_is_free_again_afterwards() -> None:
    async with serve_metrics(FakeSource(), ANYWHERE) as address:
        pass
    async with serve_metrics(FakeSource(), address) as again:
        assert again == address


# ---- the figures


async def test_before_an_executor_has_opened_there_are_no_series() -> None:
    source = FakeSource()
    source.shown_state = pb.EngineState(ready=False)
    assert await scrape(source) == ""
    assert source.num_snapshots == 0


async def test_a_scrape_is_one_snapshot() -> None:
    source = FakeSource()
    await scrape(source)
    assert source.num_snapshots == 1


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5\r\n",
        "Accept: text/plain;version=1.0.0;escaping=underscores\r\n",
    ],
)
async def test_names_keep_their_colon_whatever_the_scraper_accepts(accept: str) -> None:
    body = await scrape(FakeSource(), accept)
    assert '\nvllm:num_requests_running{engine="0",model_name="tiny"} 5.0\n' in body
    assert "vllm_" not in body


async def test_the_names_that_others_read() -> None:
    assert {
        (name, labels): value
        for (name, labels), value in values(await scrape(FakeSource())).items()
        if name.startswith("vllm:")
    } == {
        ("vllm:num_requests_running", ()): 5,
        ("vllm:num_requests_waiting", ()): 3,
        ("vllm:kv_cache_usage_perc", ()): 0.5,
        ("vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "101"))): 1,
        ("vllm:prefix_cache_queries_total", ()): 1000,
        ("vllm:prefix_cache_hits_total", ()): 211,
        ("vllm:num_preemptions_total", ()): 207,
        ("vllm:prompt_tokens_total", ()): 111,
        ("vllm:generation_tokens_total", ()): 2**53,
    }


async def test_counters_of_our_own() -> None:
    found = values(await scrape(FakeSource()))
    assert {
        (name, labels): value
        for (name, labels), value in found.items()
        if name.startswith("blockyard_") and name.endswith("_total")
    } == {
        ("blockyard_finished_requests_total", ()): 101,
        ("blockyard_recoveries_total", ()): 102,
        ("blockyard_preemptions_total", (("kind", "recompute"),)): 103,
        ("blockyard_preemptions_total", (("kind", "swap"),)): 104,
        ("blockyard_prefix_cache_hit_tokens_total", (("pool", "device"),)): 105,
        ("blockyard_prefix_cache_hit_tokens_total", (("pool", "host"),)): 106,
        ("blockyard_evicted_blocks_total", ()): 107,
        ("blockyard_copied_blocks_total", ()): 108,
        ("blockyard_swapped_out_blocks_total", ()): 109,
        ("blockyard_swapped_in_blocks_total", ()): 110,
        ("blockyard_steps_total", ()): 113,
    }
    assert found["blockyard_kv_slots_saved_by_sharing", ()] == 64


@pytest.mark.parametrize("pool", ["device", "host"])
async def test_every_class_of_a_pool_is_there_and_they_sum_to_it(pool: str) -> None:
    shown = getattr(SNAPSHOT, pool)
    expected = {
        field.name.removeprefix("num_"): getattr(shown, field.name)
        for field in shown.DESCRIPTOR.fields
        if field.name not in ("num_slots", "num_saved_by_sharing")
    }
    found = {
        dict(labels)["class"]: value
        for (name, labels), value in values(await scrape(FakeSource())).items()
        if name == "blockyard_kv_slots" and dict(labels)["pool"] == pool
    }
    assert found == expected
    assert sum(found.values()) == shown.num_slots


async def test_an_empty_pool_and_an_odd_model_name() -> None:
    body = await scrape(FakeSource(pb.SnapshotResponse(), 'a "quoted"\\\nname'))
    families = list(text_string_to_metric_families(body))
    names = {sample.labels["model_name"] for family in families for sample in family.samples}
    assert names == {'a "quoted"\\\nname'}
    usage = next(f for f in families if f.name == "vllm:kv_cache_usage_perc")
    assert usage.samples[0].value == 0


async def test_the_page_lists_what_is_served() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `([a-z_:]+)", page, re.MULTILINE))
    assert listed == {name for name, _ in values(await scrape(FakeSource()))}

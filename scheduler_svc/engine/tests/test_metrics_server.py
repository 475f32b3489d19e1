"""Scrapes over HTTP: whatever is asked, and however slowly, serving goes on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.metrics import server as metrics_server
from scheduler_svc.engine.metrics.exposition import Format, choose_format
from scheduler_svc.engine.metrics.server import serve_metrics
from scheduler_svc.engine.tests.metrics_source import FakeSource
from scheduler_svc.frontend.tests.calls import until

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@contextlib.asynccontextmanager
async def serving(source: FakeSource) -> AsyncIterator[str]:
    """A server on a free port, once it listens."""
    async with serve_metrics(source, "127.0.0.1:0") as server:
        await until(lambda: bool(server.bound_address))
        yield server.bound_address


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def ask(address: str, request: bytes) -> tuple[int, str, str]:
    """Send bytes; returns status, head and body of the answer."""
    reader, writer = await connect(address)
    writer.write(request)
    answer = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    if not answer:
        raise ConnectionError("no answer")
    head, _, body = answer.partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head
    return int(head.split()[1]), head, body


async def is_answered(address: str) -> bool:
    """Whether a scrape is answered within some seconds."""
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(ConnectionError):
                return (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == 200
            await asyncio.sleep(0.01)


async def scrape(source: FakeSource, accept: str = "") -> tuple[str, str]:
    """Content type and body of one scrape."""
    async with serving(source) as address:
        headers = f"accept: {accept}\r\n" if accept else ""
        request = f"GET /metrics HTTP/1.1\r\nHost: h\r\n{headers}\r\n"
        status, head, body = await ask(address, request.encode())
    assert status == 200
    (content_type,) = (line for line in head.split("\r\n") if line.startswith("Content-Type"))
    return content_type.partition(": ")[2], body


# ---- addresses


@pytest.mark.parametrize("address", ["9464", "localhost", "host:port", "127.0.0.1:65536"])
def test_a_malformed_address_is_refused_with_the_settings(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        EngineSettings.parse(
            ["--listen", "unix:/a", "--executor", "unix:/b", "--metrics-address", address]
        )


async def test_a_taken_port_is_told_once_and_used_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_server, "_RETRY_S", 0.02)
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    async with serve_metrics(FakeSource(), address) as server:
        await asyncio.sleep(0.1)
        assert not server.bound_address
        taken.close()
        await until(lambda: server.bound_address == address)
        assert (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == 200
    (error,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert address in error.message
    assert "in use" in error.message
    assert "--metrics-address" in error.message


@pytest.mark.parametrize("host", ["no..host", "203.0.113.1"])
async def test_a_host_that_is_not_here_is_told(host: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_metrics(FakeSource(), f"{host}:0"):
        await until(lambda: f"metrics: cannot listen on {host}:0" in caplog.text)


async def test_the_port_is_free_again_afterwards() -> None:
    async with serving(FakeSource()) as address:
        pass
    async with serve_metrics(FakeSource(), address) as again:
        await until(lambda: again.bound_address == address)


# ---- peers


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
        (b"GET /metrics HTTP/1.1\r\n: \r\n\xff\r\naccept\r\nAccept: ;;q=,\xfe\r\n\r\n", 200),
    ],
)
async def test_requests_that_are_not_a_scrape(request_head: bytes, status: int) -> None:
    source = FakeSource()
    async with serving(source) as address:
        assert (await ask(address, request_head))[0] == status
    assert source.num_readings == (status == 200)


async def test_silent_slow_and_vanishing_peers_do_not_keep_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_server, "_TIMEOUT_S", 0.3)
    async with serving(FakeSource()) as address:
        reader, silent = await connect(address)
        _, vanishing = await connect(address)
        vanishing.write(b"GET /met")
        vanishing.transport.abort()
        # Asks, and does not read: small buffers keep most of the answer with the server.
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == 200
            assert await asyncio.wait_for(reader.read(), 5) == b""  # the server hung up
        silent.close()


async def test_more_connections_than_there_may_be_are_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_server, "_MAX_CONNECTIONS", 2)
    async with serving(FakeSource()) as address:
        waiting = [await connect(address) for _ in range(2)]
        reader, _ = await connect(address)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""  # at once
        for _, writer in waiting:
            writer.close()
        assert await is_answered(address)


async def test_the_loop_goes_round_while_an_answer_is_written() -> None:
    num_turns = 0

    async def count() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    async with serving(FakeSource()) as address:
        before = num_turns
        await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert num_turns - before > 50  # a turn for each family
    counting.cancel()


async def test_before_an_executor_has_opened_there_are_no_series() -> None:
    source = FakeSource()
    source.is_ready = False
    assert (await scrape(source))[1] == ""
    assert (await scrape(source, PROMETHEUS_2))[1] == "# EOF\n"


# ---- formats


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        ("text/html, application/json", Format.TEXT),
        ("text/plain;version=0.0.4", Format.TEXT),
        ("text/plain;version=1.0.0;escaping=underscores", Format.TEXT),
        ("application/openmetrics-text;q=0.1,text/plain;q=0.5", Format.TEXT),
        ("application/openmetrics-text;q=0", Format.TEXT),
        ("application/openmetrics-text;q=high", Format.TEXT),
        ("Application/OpenMetrics-Text; version=1.0.0", Format.OPENMETRICS),
        ("application/openmetrics-text;escaping=allow-utf-8", Format.OPENMETRICS_UTF8),
        (PROMETHEUS_2, Format.OPENMETRICS),
        (PROMETHEUS_3, Format.OPENMETRICS_UTF8),
    ],
)
def test_the_scraper_chooses_the_format(accept: str, chosen: Format) -> None:
    assert choose_format(accept) is chosen


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        (
            "text/plain;version=1.0.0;escaping=underscores",
            "text/plain; version=0.0.4; charset=utf-8",
        ),
        (PROMETHEUS_2, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            PROMETHEUS_3,
            "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
        ),
    ],
)
async def test_names_keep_their_colon_whatever_the_scraper_accepts(
    accept: str, content_type: str
) -> None:
    found, body = await scrape(FakeSource(), accept)
    assert found == content_type
    assert '\nvllm:num_requests_running{engine="0",model_name="tiny"} 5.0\n' in body
    assert (
        '\nvllm:time_to_first_token_seconds_bucket{engine="0",model_name="tiny",le="0.001"} 0.0\n'
        in body
    )
    assert "vllm_" not in body


async def test_exemplars_are_there_under_openmetrics_only() -> None:
    source = FakeSource()
    source.recorder.queue.observe(0.4, bytes(range(16)))
    (_, plain), (_, rich) = await scrape(source), await scrape(source, PROMETHEUS_3)
    assert "trace_id" not in plain
    parse: Callable[[str], Iterator[Metric]] = text_string_to_metric_families  # has no types
    families = parse(rich.replace("vllm:", "vllm_"))
    exemplars = {
        (sample.name, sample.labels["le"]): sample.exemplar
        for family in families
        for sample in family.samples
        if sample.exemplar is not None
    }
    ((where, exemplar),) = exemplars.items()
    assert where == ("vllm_request_queue_time_seconds_bucket", "0.5")
    assert exemplar.labels == {"trace_id": bytes(range(16)).hex()}
    assert exemplar.value == 0.4

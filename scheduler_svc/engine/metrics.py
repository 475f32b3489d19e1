"""Prometheus metrics, made from one snapshot of the engine when somebody scrapes.

A step costs nothing. The server runs on the engine's own loop, so a scrape falls between two
steps and its figures belong together: the classes of a pool sum to the pool in every answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from blockyard.common.listen_address import ListenError, split_host_port
from blockyard.engine.v1 import engine_pb2 as pb

_LABELS: Final = ("model_name", "engine")
_ENGINE_INDEX: Final = "0"  # readers of the vllm: names expect the label; there is one engine
_MAX_HEAD_BYTES: Final = 8192
_TIMEOUT_S: Final = 5.0

Values = Mapping[tuple[str, ...], float]
"""A value for each combination of a family's own labels."""


class SnapshotSource(Protocol):
    """What the metrics are read from: the engine."""

    def state(self) -> pb.EngineState:
        """Whether an executor has opened yet, and the model."""

    def snapshot(self) -> pb.SnapshotResponse:
        """Queues, pools and counters between two steps."""


@dataclass(frozen=True, slots=True)
class _Family:
    """One metric: its name without `_total`, and how it is read from a snapshot."""

    type: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    documentation: str
    read: Callable[[pb.SnapshotResponse], float | Values]
    labels: tuple[str, ...] = ()

    def collect(self, snapshot: pb.SnapshotResponse, model_name: str) -> Metric:
        """The metric with its values of this snapshot."""
        metric = self.type(self.name, self.documentation, labels=(*_LABELS, *self.labels))
        read = self.read(snapshot)
        for values, value in (read if isinstance(read, Mapping) else {(): read}).items():
            metric.add_metric((model_name, _ENGINE_INDEX, *values), value)
        return metric


def _usage(snapshot: pb.SnapshotResponse) -> float:
    device = snapshot.device
    held = device.num_stored + device.num_in_flight + device.num_unused
    usable = device.num_slots - device.num_padding
    return held / usable if usable else 0.0


def _cache_config(snapshot: pb.SnapshotResponse) -> Values:
    block_size = snapshot.block_size
    num_blocks = snapshot.device.num_slots // block_size if block_size else 0
    return {(str(block_size), str(num_blocks)): 1}


def _slots(snapshot: pb.SnapshotResponse) -> Values:
    device, host = snapshot.device, snapshot.host
    return {
        ("device", "stored"): device.num_stored,
        ("device", "in_flight"): device.num_in_flight,
        ("device", "unused"): device.num_unused,
        ("device", "cached"): device.num_cached,
        ("device", "free"): device.num_free,
        ("device", "padding"): device.num_padding,
        ("host", "swapped"): host.num_swapped,
        ("host", "cached"): host.num_cached,
        ("host", "free"): host.num_free,
    }


# Names that dashboards, routers and autoscalers already read.
_VLLM: Final = (
    _Family(
        GaugeMetricFamily,
        "vllm:num_requests_running",
        "Branches that hold a row of the executor.",
        lambda s: s.num_running,
    ),
    _Family(
        GaugeMetricFamily,
        "vllm:num_requests_waiting",
        "Branches in the queue; a request that waits for its first prefill is one.",
        lambda s: s.num_waiting,
    ),
    _Family(
        GaugeMetricFamily,
        "vllm:kv_cache_usage_perc",
        "Part of the usable device blocks that requests hold, 0 to 1.",
        _usage,
    ),
    _Family(
        GaugeMetricFamily,
        "vllm:cache_config_info",
        "Sizes of the device pool, in the labels; the padding block is counted.",
        _cache_config,
        ("block_size", "num_gpu_blocks"),
    ),
    _Family(
        CounterMetricFamily,
        "vllm:prefix_cache_queries",
        "Tokens of admitted branches that the prefix cache was asked for.",
        lambda s: s.counters.num_queried_tokens,
    ),
    _Family(
        CounterMetricFamily,
        "vllm:prefix_cache_hits",
        "Tokens of admitted branches that the prefix cache had, on either pool.",
        lambda s: s.counters.num_hit_tokens_device + s.counters.num_hit_tokens_host,
    ),
    _Family(
        CounterMetricFamily,
        "vllm:num_preemptions",
        "Branches preempted, of either kind.",
        lambda s: s.counters.num_preemptions_by_recompute + s.counters.num_preemptions_by_swap,
    ),
    _Family(
        CounterMetricFamily,
        "vllm:prompt_tokens",
        "Prompt tokens of requests that were queued.",
        lambda s: s.counters.num_prompt_tokens,
    ),
    _Family(
        CounterMetricFamily,
        "vllm:generation_tokens",
        "Output tokens.",
        lambda s: s.counters.num_output_tokens,
    ),
)

_OWN: Final = (
    _Family(
        GaugeMetricFamily,
        "blockyard_kv_slots",
        "Token slots by class; the classes of a pool sum to the pool.",
        _slots,
        ("pool", "class"),
    ),
    _Family(
        GaugeMetricFamily,
        "blockyard_kv_slots_saved_by_sharing",
        "Device slots that sharing saves: referenced minus distinct.",
        lambda s: s.device.num_saved_by_sharing,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_prefix_cache_hit_tokens",
        "Prefix cache hits by the pool that had the tokens.",
        lambda s: {
            ("device",): s.counters.num_hit_tokens_device,
            ("host",): s.counters.num_hit_tokens_host,
        },
        ("pool",),
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_preemptions",
        "Branches preempted, by what becomes of their blocks.",
        lambda s: {
            ("recompute",): s.counters.num_preemptions_by_recompute,
            ("swap",): s.counters.num_preemptions_by_swap,
        },
        ("kind",),
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_swapped_out_blocks",
        "Blocks moved from the device to the host.",
        lambda s: s.counters.num_swapped_out,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_swapped_in_blocks",
        "Blocks moved from the host to the device.",
        lambda s: s.counters.num_swapped_in,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_copied_blocks",
        "Partial blocks copied so that branches could part.",
        lambda s: s.counters.num_copied,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_evicted_blocks",
        "Cached blocks given up for new ones.",
        lambda s: s.counters.num_evicted,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_finished_requests",
        "Requests that ended, for whatever reason.",
        lambda s: s.counters.num_finished,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_recoveries",
        "Executor epochs after the first.",
        lambda s: s.counters.num_recoveries,
    ),
    _Family(
        CounterMetricFamily,
        "blockyard_steps",
        "Steps planned and sent.",
        lambda s: s.counters.num_steps,
    ),
)


class SnapshotCollector:
    """A prometheus_client collector over one source."""

    def __init__(self, source: SnapshotSource) -> None:
        """Read from `source`, at each `collect` once."""
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Every metric; none before an executor has opened, when model and pools are unknown."""
        state = self._source.state()
        if not state.ready:
            return
        snapshot = self._source.snapshot()
        for family in (*_VLLM, *_OWN):
            yield family.collect(snapshot, state.model_name)


@contextlib.asynccontextmanager
async def serve_metrics(source: SnapshotSource, address: str) -> AsyncIterator[str]:
    """Answer GET /metrics over HTTP until the exit, on the running loop.

    Args:
        source: what to read; called on this loop only.
        address: host:port; port 0 picks a free one.

    Yields the host:port that it listens on. Raises ListenError if it cannot, ValueError if
    `address` is malformed.
    """
    host, port = split_host_port(address)
    collector = SnapshotCollector(source)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A peer that is slow or goes away loses its answer; nobody else is concerned.
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_TIMEOUT_S):
                with contextlib.closing(writer):
                    writer.write(await _response(collector, reader))
                    await writer.drain()

    try:
        server = await asyncio.start_server(answer, host, port, limit=_MAX_HEAD_BYTES)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host cannot be a name
        raise ListenError(
            f"metrics: cannot listen on {address} ({error}); choose another --metrics-address"
        ) from error
    try:
        yield f"{address.rpartition(':')[0]}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _response(collector: SnapshotCollector, reader: asyncio.StreamReader) -> bytes:
    """Read one request's head; the whole answer to it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return _http("400 Bad Request", b"not an HTTP request\n")
    match head.partition(b"\r\n")[0].split(b" "):
        case [method, target, version] if version.startswith(b"HTTP/1."):
            if target.partition(b"?")[0] != b"/metrics":
                return _http("404 Not Found", b"the metrics are at /metrics\n")
            if method != b"GET":
                return _http("405 Method Not Allowed", b"use GET\n", "Allow: GET\r\n")
            return _http("200 OK", generate_latest(collector))
    return _http("400 Bad Request", b"not an HTTP request\n")


def _http(status: str, body: bytes, headers: str = "") -> bytes:
    # Always text 0.0.4, whatever the scraper accepts: under OpenMetrics the library turns the
    # colon of the vllm: names into an underscore unless the scraper asks it not to.
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE_PLAIN_0_0_4}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    )
    return head.encode() + body

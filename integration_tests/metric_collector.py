"""A small OTLP/gRPC collector of metrics that keeps what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as pb_grpc


class HistogramPoint(NamedTuple):
    """One data point of a histogram."""

    service: str
    name: str
    attributes: dict[str, str]
    bounds: list[float]
    trace_ids: set[str]  # of its exemplars


class MetricCollector(pb_grpc.MetricsServiceServicer):
    """Collects in the test's own loop; use as a context manager."""

    def __init__(self, address: str) -> None:
        """Listen on `address`, once entered."""
        self.points: list[HistogramPoint] = []
        self._server = grpc.aio.server()
        add: Any = pb_grpc.add_MetricsServiceServicer_to_server  # has no types
        add(self, self._server)
        self._server.add_insecure_port(address)

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        await self._server.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop at once."""
        await self._server.stop(None)

    async def Export(
        self, request: pb.ExportMetricsServiceRequest, context: Any
    ) -> pb.ExportMetricsServiceResponse:
        """Keep a batch."""
        for group in request.resource_metrics:
            service = _attributes(group.resource)["service.name"]
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    self.points += [
                        _point(service, metric.name, point)
                        for point in metric.histogram.data_points
                    ]
        return pb.ExportMetricsServiceResponse()

    async def until(
        self, condition: Callable[[list[HistogramPoint]], bool], timeout_s: float = 20.0
    ) -> None:
        """Wait for what was to be collected. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition(self.points):  # noqa: ASYNC110 - as until
                await asyncio.sleep(0.05)


def _point(service: str, name: str, point: Any) -> HistogramPoint:
    return HistogramPoint(
        service,
        name,
        _attributes(point),
        list(point.explicit_bounds),
        {exemplar.trace_id.hex() for exemplar in point.exemplars},
    )


def _attributes(owner: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in owner.attributes}

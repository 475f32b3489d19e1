"""Where metrics of OpenTelemetry's conventions go: to the traces' collector, once a minute.

OTEL_METRIC_EXPORT_INTERVAL changes that. A collector that takes none costs metrics, never service.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)

from scheduler_svc.telemetry.export import SHUTDOWN_S
from scheduler_svc.telemetry.loss_report import LossReport
from scheduler_svc.telemetry.resource import service_resource

_EXPORT_TIMEOUT_S: Final = 5.0
_SCOPE: Final = "blockyard"

Read = Callable[[], Sequence[Metric]]
"""Called from a thread: what was measured since the start."""


class MetricExport:
    """Sends what this process measured, from a thread."""

    def __init__(self, exporter: MetricExporter, service: str, read: Read) -> None:
        """Send to `exporter`, as `service`; `to_collector` makes the usual one."""
        reader = PeriodicExportingMetricReader(_Adding(exporter, read))
        resource = service_resource(service, str(uuid.uuid4()))
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        start_s = time.monotonic()

        def uptime(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(time.monotonic() - start_s)

        # Without an instrument of its own the SDK would send nothing.
        self._provider.get_meter(_SCOPE).create_observable_gauge(
            "process.uptime", [uptime], "s", "Time since the process can measure."
        )

    @classmethod
    def to_collector(cls, endpoint: str, service: str, read: Read) -> MetricExport:
        """Send to an OTLP/gRPC collector; nothing is connected yet."""
        return cls(_Collector(endpoint), service, read)

    def close(self) -> None:
        """Send what was measured last, for SHUTDOWN_S at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(SHUTDOWN_S)


class _Adding(MetricExporter):
    """Adds what is not measured by the SDK's instruments to what is."""

    def __init__(self, exporter: MetricExporter, read: Read) -> None:
        super().__init__()
        self._exporter = exporter
        self._read = read

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any
    ) -> MetricExportResult:
        """Send what was measured since the last time; see MetricExporter."""
        (resource,) = metrics_data.resource_metrics
        # The SDK may measure itself, in a scope of its own.
        scopes = [
            replace(each, metrics=[*each.metrics, *self._read()])
            if each.scope.name == _SCOPE
            else each
            for each in resource.scope_metrics
        ]
        data = MetricsData([replace(resource, scope_metrics=scopes)])
        return self._exporter.export(data, timeout_millis, **more)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Nothing is held back here."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        """End the connection."""
        self._exporter.shutdown(timeout_millis, **more)


class _Collector(OTLPMetricExporter):
    """Logs when metrics begin to be lost, and when they arrive again."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(
            endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_TIMEOUT_S
        )
        self._losses = LossReport("metrics", endpoint)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any
    ) -> MetricExportResult:
        """Send a batch; see MetricExporter."""
        result = super().export(metrics_data, timeout_millis, **more)
        self._losses.note(is_taken=result is MetricExportResult.SUCCESS)
        return result

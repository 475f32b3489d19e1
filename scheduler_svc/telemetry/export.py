"""Where spans go: a bounded queue, and a thread that sends it to the collector.

A collector that is down, slow or absent costs spans, never service: the queue drops what does not
fit, and the end of the process waits for it for SHUTDOWN_S at most.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBasedTraceIdRatio, Sampler
from opentelemetry.trace import Tracer

from scheduler_svc.telemetry.loss_report import LossReport
from scheduler_svc.telemetry.resource import service_resource

SHUTDOWN_S: Final = 2.0
"""Longest wait for the last spans at the end of the process."""

_MAX_QUEUED_SPANS: Final = 8192
_MAX_BATCH_SPANS: Final = 512
_BATCH_DELAY_MS: Final = 1000
_EXPORT_TIMEOUT_S: Final = 5.0

_SCOPE: Final = "blockyard"


class TraceExport:
    """One queue and one connection for all spans of this process."""

    def __init__(self, processor: SpanProcessor) -> None:
        """Send spans to `processor`; `to_collector` makes the usual one."""
        self._processor = processor
        self._instance_id = str(uuid.uuid4())

    @classmethod
    def to_collector(cls, endpoint: str) -> TraceExport:
        """Send spans to an OTLP/gRPC collector, from a thread; nothing is connected yet."""
        # Its own lines come with every batch that fails; ours once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = OTLPSpanExporter(
            endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_TIMEOUT_S
        )
        processor = BatchSpanProcessor(
            ReportingExporter(exporter, endpoint),
            max_queue_size=_MAX_QUEUED_SPANS,
            schedule_delay_millis=_BATCH_DELAY_MS,
            max_export_batch_size=_MAX_BATCH_SPANS,
        )
        return cls(processor)

    def tracer(self, service: str, sample_ratio: float | None = None) -> Tracer:
        """A tracer whose spans say that they are of `service`.

        Args:
            service: service.name of the resource.
            sample_ratio: of traces that begin here; those of others follow their parent.
                None: whoever makes spans has decided already.
        """
        sampler: Sampler = ALWAYS_ON
        if sample_ratio is not None:
            sampler = ParentBasedTraceIdRatio(sample_ratio)
        resource = service_resource(service, self._instance_id)
        provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        return provider.get_tracer(_SCOPE)

    def close(self) -> None:
        """Send what is queued, for SHUTDOWN_S at most."""
        # The processor would wait for 30 s, for a collector that may never answer.
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(SHUTDOWN_S)


def begin(endpoint: str) -> TraceExport | None:
    """Export to the collector that the settings name; None if they name none."""
    return TraceExport.to_collector(endpoint) if endpoint else None


class ReportingExporter(SpanExporter):
    """Logs when spans begin to be lost, and when they arrive again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._losses = LossReport("traces", endpoint)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; see SpanExporter."""
        result = self._exporter.export(spans)
        self._losses.note(is_taken=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        """End the connection."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back here."""
        return True

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from scheduler_svc.telemetry.export import SHUTDOWN_S, ReportingExporter, TraceExport


class _Scripted(SpanExporter):
    def __init__(self, *results: bool) -> None:
        self._results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS if self._results.pop(0) else SpanExportResult.FAILURE


def test_a_collector_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    exporter = ReportingExporter(_Scripted(True, False, False, True, False), "there:1")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            exporter.export([])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert "there:1" in caplog.text


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_roots_are_sampled_by_the_ratio(ratio: float) -> None:
    spans = InMemorySpanExporter()
    tracer = TraceExport(SimpleSpanProcessor(spans)).tracer("s", ratio)
    for _ in range(10):
        tracer.start_span("x").end()
    assert len(spans.get_finished_spans()) == 10 * ratio


def test_nobody_waits_long_for_a_collector_that_is_not_there() -> None:
    export = TraceExport.to_collector("127.0.0.1:1")
    tracer = export.tracer("s")
    begin = time.monotonic()
    for _ in range(20_000):  # more than the queue holds
        tracer.start_span("x").end()
    export.close()
    export.close()
    assert time.monotonic() - begin < 2 * SHUTDOWN_S + 3

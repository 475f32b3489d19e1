"""The instruments of the GenAI conventions, as an exporter gets them."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

from scheduler_svc.telemetry.gen_ai import GenAiMetrics
from scheduler_svc.telemetry.metric_export import MetricExport

# https://github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-metrics.md
BOUNDS = {
    "gen_ai.server.request.duration": [
        *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
        *(1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ],
    "gen_ai.server.time_per_output_token": [
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ],
    "gen_ai.server.time_to_first_token": [
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
        *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ],
}
COMMON = {
    "gen_ai.provider.name": "blockyard",
    "gen_ai.request.model": "tiny",
    "gen_ai.response.model": "tiny",
}


class Measured(MetricExporter):
    """Instruments, and what was exported of them."""

    def __init__(self) -> None:
        super().__init__()
        self.instruments = GenAiMetrics("tiny")
        self._export = MetricExport(self, "s", self.instruments.read)
        self._data: list[MetricsData] = []

    def export(self, metrics_data: MetricsData, *_: Any, **__: Any) -> MetricExportResult:
        self._data.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        pass

    def points(self) -> dict[str, list[dict[str, Any]]]:
        """Data points by instrument, as OTLP has them; ends the export."""
        self._export.close()
        (data,) = self._data
        (resource,) = MessageToDict(encode_metrics(data))["resourceMetrics"]
        assert {"key": "service.name", "value": {"stringValue": "s"}} in resource["resource"][
            "attributes"
        ]
        (scope,) = resource["scopeMetrics"]
        assert {metric["unit"] for metric in scope["metrics"]} == {"s"}
        uptime, *others = scope["metrics"]
        assert (uptime["name"], len(uptime["gauge"]["dataPoints"])) == ("process.uptime", 1)
        found = {metric["name"]: metric["histogram"] for metric in others}
        cumulative = "AGGREGATION_TEMPORALITY_CUMULATIVE"
        assert {each["aggregationTemporality"] for each in found.values()} <= {cumulative}
        return {name: histogram["dataPoints"] for name, histogram in found.items()}


def attributes(point: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"]["stringValue"] for each in point["attributes"]}


def test_names_buckets_and_attributes_are_those_of_the_conventions() -> None:
    measured = Measured()
    measured.instruments.ended("chat", "", 3.0, 0.3, 0.03)
    found = measured.points()
    assert {name: point["explicitBounds"] for name, (point,) in found.items()} == BOUNDS
    for (point,) in found.values():
        assert attributes(point) == {**COMMON, "gen_ai.operation.name": "chat"}
        assert (point["count"], sorted(point["bucketCounts"])[-2:]) == ("1", ["0", "1"])
        assert 0 < int(point["startTimeUnixNano"]) <= int(point["timeUnixNano"])
    assert {name: point["sum"] for name, (point,) in found.items()} == {
        "gen_ai.server.request.duration": 3.0,
        "gen_ai.server.time_to_first_token": 0.3,
        "gen_ai.server.time_per_output_token": 0.03,
    }


def test_a_request_that_failed_counts_apart_and_only_its_duration() -> None:
    measured = Measured()
    measured.instruments.ended("text_completion", "QUEUE_FULL", 0.001, None, None)
    measured.instruments.ended("text_completion", "", 2.0, 1.0, None)
    found = measured.points()
    durations = found["gen_ai.server.request.duration"]
    assert {attributes(point).get("error.type"): point["count"] for point in durations} == {
        "QUEUE_FULL": "1",
        None: "1",
    }
    (first_token,) = found["gen_ai.server.time_to_first_token"]
    assert first_token["count"] == "1"
    assert "gen_ai.server.time_per_output_token" not in found


@pytest.mark.parametrize("is_sampled", [True, False])
def test_exemplars_carry_the_trace_of_a_sampled_call(is_sampled: bool) -> None:
    measured = Measured()
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if is_sampled else 0)
    span = trace.NonRecordingSpan(trace.SpanContext(7, 8, is_remote=True, trace_flags=flags))
    with trace.use_span(span):
        measured.instruments.ended("chat", "", 3.0, 0.3, 0.03)
    for (point,) in measured.points().values():
        exemplars = point.get("exemplars", [])
        ids = [(each["traceId"], each["spanId"]) for each in exemplars]
        assert ids == [(_base64(7, 16), _base64(8, 8))] * is_sampled
        assert [each["asDouble"] for each in exemplars] == [point["sum"]] * is_sampled


def _base64(number: int, num_bytes: int) -> str:
    return base64.b64encode(number.to_bytes(num_bytes, "big")).decode()

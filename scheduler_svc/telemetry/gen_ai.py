"""The server metrics of OpenTelemetry's GenAI conventions, which go to the collector over OTLP.

https://github.com/open-telemetry/semantic-conventions-genai

The SDK's own histograms take 15 us for each value. These are filled like all others here, and
become the SDK's data only when they are sent, once a minute.
"""

from __future__ import annotations

import time
from typing import Final

from opentelemetry import trace
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData

from scheduler_svc.telemetry import buckets
from scheduler_svc.telemetry.histogram import Histogram

PROVIDER: Final = "blockyard"

_Labels = tuple[str, str]
"""Operation, and why there was no answer."""


class GenAiMetrics:
    """One front end's instruments. Filled by one thread, read by any."""

    def __init__(self, model_name: str) -> None:
        """`model_name` is that of all requests."""
        self._attributes = {
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model_name,
            "gen_ai.response.model": model_name,
        }
        self._start_ns = time.time_ns()
        self._request_duration = _Instrument(
            "gen_ai.server.request.duration",
            "Time from the arrival of a request to its end.",
            buckets.GEN_AI_REQUEST_DURATION,
        )
        self._time_to_first_token = _Instrument(
            "gen_ai.server.time_to_first_token",
            "Time to the first token of requests that were answered.",
            buckets.GEN_AI_TIME_TO_FIRST_TOKEN,
        )
        self._time_per_output_token = _Instrument(
            "gen_ai.server.time_per_output_token",
            "Time per token after the first of requests that were answered.",
            buckets.GEN_AI_TIME_PER_OUTPUT_TOKEN,
        )

    def ended(
        self,
        operation: str,
        error_type: str,
        duration_s: float,
        first_token_s: float | None,
        time_per_token_s: float | None,
    ) -> None:
        """A request is over; if the current span is sampled, its trace is an exemplar.

        Args:
            operation: chat or text_completion.
            error_type: empty: it was answered.
            duration_s: all of it.
            first_token_s: to its first token; None: it got none.
            time_per_token_s: after the first; None: there was none after it.
        """
        labels = operation, error_type
        span = trace.get_current_span().get_span_context()
        traced = span if span.trace_flags.sampled else None
        self._request_duration.record(duration_s, labels, traced)
        if error_type:
            return
        if first_token_s is not None:
            self._time_to_first_token.record(first_token_s, labels, traced)
        if time_per_token_s is not None:
            self._time_per_output_token.record(time_per_token_s, labels, traced)

    def read(self) -> list[Metric]:
        """Everything since the start."""
        instruments = (
            self._request_duration,
            self._time_to_first_token,
            self._time_per_output_token,
        )
        times_ns = self._start_ns, time.time_ns()
        metrics = (instrument.read(self._attributes, *times_ns) for instrument in instruments)
        return [metric for metric in metrics if metric.data.data_points]


class _Instrument:
    """A histogram of seconds for each pair of labels."""

    def __init__(self, name: str, description: str, bounds: buckets.Bounds) -> None:
        self._name = name
        self._description = description
        self._bounds = bounds
        self._series: dict[_Labels, tuple[Histogram, dict[int, Exemplar]]] = {}

    def record(self, value_s: float, labels: _Labels, traced: trace.SpanContext | None) -> None:
        """Count a value; `traced` becomes its bucket's exemplar."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = Histogram(self._bounds), {}
        histogram, exemplars = series
        bucket = histogram.observe(value_s)
        if traced is not None:
            exemplars[bucket] = Exemplar(
                {}, value_s, time.time_ns(), traced.span_id, traced.trace_id
            )

    def read(self, attributes: dict[str, str], start_ns: int, now_ns: int) -> Metric:
        """As the SDK has it; of each bucket the newest exemplar."""
        points = []
        for (operation, error_type), (histogram, exemplars) in list(self._series.items()):
            labels = {**attributes, "gen_ai.operation.name": operation}
            if error_type:
                labels["error.type"] = error_type
            counts = list(histogram.counts)
            points.append(
                HistogramDataPoint(
                    labels,
                    start_ns,
                    now_ns,
                    sum(counts),
                    histogram.sum,
                    counts,
                    self._bounds,
                    min=None,  # type: ignore[arg-type]  # OTLP does without
                    max=None,  # type: ignore[arg-type]
                    exemplars=list(exemplars.values()),
                )
            )
        data = HistogramData(points, AggregationTemporality.CUMULATIVE)
        return Metric(self._name, self._description, "s", data)

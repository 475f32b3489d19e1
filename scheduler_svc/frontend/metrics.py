"""What a front end counts for the engine, whose metrics endpoint answers for all processes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from blockyard.common.process import process_usage
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.frontend.choice_output import Chunk
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.output_stream import OutputStream
from scheduler_svc.frontend.request_log import RequestRecord
from scheduler_svc.telemetry import buckets
from scheduler_svc.telemetry.gen_ai import GenAiMetrics
from scheduler_svc.telemetry.histogram import Histogram
from scheduler_svc.telemetry.loop_lag import LoopLag

_REPORT_PERIOD_S: Final = 2.0


class FrontendMetrics:
    """Counts since the last report."""

    def __init__(self, fanout: Fanout, lag: LoopLag, gen_ai: GenAiMetrics | None = None) -> None:
        """Start at nothing; `gen_ai` is told of each request too."""
        self._fanout = fanout
        self._lag = lag
        self._gen_ai = gen_ai
        self._time_to_first_token = Histogram(buckets.TIME_TO_FIRST_TOKEN)
        self._e2e_latency = Histogram(buckets.REQUEST)
        self._time_per_output_token = Histogram(buckets.INTER_TOKEN)
        self._rpcs: Counter[tuple[str, str, str]] = Counter()  # by method, code, reason
        self._num_messages = 0
        self._num_tokens = 0
        self._reported_cpu_s = 0.0

    def sent(self, chunks: Sequence[Chunk]) -> None:
        """A message each was sent to a client."""
        self._num_messages += len(chunks)
        for chunk in chunks:
            self._num_tokens += len(chunk.token_ids)

    def ended(self, record: RequestRecord, stream: OutputStream | None) -> None:
        """A call is over; `stream` is None if it was refused before it had one.

        Called where the call's span is the current one: it is the GenAI metrics' exemplar.
        """
        now_ns = time.monotonic_ns()
        self._rpcs[record.method, record.status, record.reason] += 1
        duration_s = (now_ns - record.start_ns) / 1e9
        first_token_s = time_per_token_s = None
        if stream is not None and (first_ns := stream.first_token_ns) is not None:
            first_token_s = (first_ns - record.start_ns) / 1e9
            self._time_to_first_token.observe(first_token_s, record.trace_id)
            num_more = stream.num_output_tokens // stream.num_choices - 1
            if record.status == "OK" and num_more > 0:
                time_per_token_s = (now_ns - first_ns) / 1e9 / num_more
                self._time_per_output_token.observe(time_per_token_s, record.trace_id)
        if record.status == "OK":
            self._e2e_latency.observe(duration_s, record.trace_id)
        if self._gen_ai is not None:
            times_s = (duration_s, first_token_s, time_per_token_s)
            self._gen_ai.ended(record.operation, record.error_type, *times_s)

    def take_report(self) -> pb.FrontendMetrics:
        """What was counted since the last report, and how things are; the counts start again."""
        usage = process_usage()
        report = pb.FrontendMetrics(
            time_to_first_token=_take(self._time_to_first_token),
            e2e_latency=_take(self._e2e_latency),
            time_per_output_token=_take(self._time_per_output_token),
            rpcs=[
                pb.RpcIncrease(method=method, code=code, reason=reason, count=count)
                for (method, code, reason), count in self._rpcs.items()
            ],
            num_messages=self._num_messages,
            num_tokens=self._num_tokens,
            cpu_seconds=usage.cpu_s - self._reported_cpu_s,
            num_open_streams=self._fanout.num_open,
            resident_bytes=usage.resident_bytes,
            loop_lag_s=self._lag.value_s,
            coalescing_interval_s=self._fanout.interval_s,
        )
        self._rpcs.clear()
        self._num_messages = self._num_tokens = 0
        self._reported_cpu_s = usage.cpu_s
        return report


async def report_metrics(metrics: FrontendMetrics, link: EngineLink) -> None:
    """Report while the engine wants it, until cancelled."""
    while True:
        await asyncio.sleep(_REPORT_PERIOD_S)
        if link.wants_metrics:
            link.report(metrics.take_report())


def _take(histogram: Histogram) -> pb.HistogramIncrease | None:
    """Its counts, which start again; None if there are none."""
    if not any(histogram.counts):
        return None
    increase = pb.HistogramIncrease(
        counts=histogram.counts,
        sum=histogram.sum,
        exemplars=[
            pb.Exemplar(bucket=bucket, **exemplar._asdict())
            for bucket, exemplar in histogram.exemplars.items()
        ],
    )
    histogram.clear()
    return increase

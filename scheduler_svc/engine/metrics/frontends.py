"""What all front ends counted, and how the connected ones are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.telemetry import buckets
from scheduler_svc.telemetry.histogram import Exemplar, Histogram


class MetricsReportError(Exception):
    """A front end's report does not fit; nothing of it was taken."""


class FrontendTotals:
    """Sums of all reports; they outlive the front ends that sent them."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(buckets.TIME_TO_FIRST_TOKEN)
        self.e2e_latency = Histogram(buckets.REQUEST)
        self.time_per_output_token = Histogram(buckets.INTER_TOKEN)
        self.rpcs: Counter[tuple[str, ...]] = Counter()  # by method, code, reason
        self.num_messages = 0
        self.num_tokens = 0
        self.cpu_seconds = 0.0
        self._newest: dict[int, pb.FrontendMetrics] = {}  # of connected front ends, by link

    @property
    def num_slow_readers(self) -> int:
        """Streams that were ended because their client read too slowly."""
        return sum(count for key, count in self.rpcs.items() if key[2] == "SLOW_READER")

    @property
    def connected(self) -> Iterable[pb.FrontendMetrics]:
        """The newest report of each front end that has sent one and is connected."""
        return self._newest.values()

    def add(self, link_index: int, report: pb.FrontendMetrics) -> None:
        """Take a report. Raises MetricsReportError."""
        pairs = (
            (self.time_to_first_token, report.time_to_first_token),
            (self.e2e_latency, report.e2e_latency),
            (self.time_per_output_token, report.time_per_output_token),
        )
        for histogram, increase in pairs:
            num_buckets = len(histogram.counts)
            if len(increase.counts) not in (0, num_buckets):
                raise MetricsReportError(
                    f"a histogram of {len(increase.counts)} buckets, not {num_buckets}"
                )
            if any(exemplar.bucket >= num_buckets for exemplar in increase.exemplars):
                raise MetricsReportError("an exemplar of a bucket that is not there")
        for histogram, increase in pairs:
            if increase.counts:
                exemplars = {
                    each.bucket: Exemplar(each.value, each.trace_id, each.unix_s)
                    for each in increase.exemplars
                }
                histogram.add(increase.counts, increase.sum, exemplars)
        for rpc in report.rpcs:
            self.rpcs[rpc.method, rpc.code, rpc.reason] += rpc.count
        self.num_messages += report.num_messages
        self.num_tokens += report.num_tokens
        self.cpu_seconds += report.cpu_seconds
        self._newest[link_index] = report

    def leave(self, link_index: int) -> None:
        """A front end is gone; what it counted stays."""
        self._newest.pop(link_index, None)

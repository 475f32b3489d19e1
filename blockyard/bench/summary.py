"""From times to figures."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from blockyard.bench.load import LoadResult
from blockyard.bench.times import RequestTimes

Percentiles = dict[str, float]
"""p50, p90, p99, mean, max [ms] and count; empty if nothing was measured."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one load. Latencies and rates are of the requests that did not fail.

    A latency counts from when the request was due. TPOT is a sample's time per token after its
    first message, ITL the time between two of its messages, which merge tokens under load.
    """

    num_requests: int
    num_failed: int
    errors: dict[str, int]
    """What went wrong, and how often."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    """Prompt tokens found in the server's prefix cache."""
    num_preemptions: int
    duration_s: float
    """From the start to the last token."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output."""
    tokens_per_message: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles
    max_send_lag_ms: float
    """Latest that a request was sent after it was due."""
    client_cores: list[float]
    """CPU that each client process used; near 1 it held the measurement back."""


def summarise(result: LoadResult) -> Summary:
    """All figures of one load."""
    good = [request for request in result.requests if request.error is None]
    choices = [choice for request in good for choice in request.choices]
    bad = [request.error for request in result.requests if request.error is not None]
    duration_s = max((request.end_s for request in good), default=result.start_s) - result.start_s
    num_prompt_tokens = sum(request.num_prompt_tokens for request in good)
    num_output_tokens = sum(request.num_output_tokens for request in good)
    num_messages = sum(1 + len(choice.gaps_s) for choice in choices)

    def per_s(count: int) -> float:
        return count / duration_s if duration_s > 0 else 0.0

    return Summary(
        num_requests=len(result.requests),
        num_failed=len(bad),
        errors=dict(collections.Counter(bad).most_common()),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(request.num_cached_tokens for request in good),
        num_preemptions=sum(request.num_preemptions for request in good),
        duration_s=duration_s,
        requests_per_s=per_s(len(good)),
        output_tokens_per_s=per_s(num_output_tokens),
        total_tokens_per_s=per_s(num_prompt_tokens + num_output_tokens),
        tokens_per_message=num_output_tokens / num_messages if num_messages else 0.0,
        ttft_ms=_percentiles(request.first_token_s for request in good),
        tpot_ms=_percentiles(c.token_time_s for c in choices if c.token_time_s is not None),
        itl_ms=_percentiles(gap_s for choice in choices for gap_s in choice.gaps_s),
        e2e_ms=_percentiles(request.total_s for request in good),
        max_send_lag_ms=_max_send_lag_ms(result.requests),
        client_cores=result.client_cores,
    )


def _max_send_lag_ms(requests: Iterable[RequestTimes]) -> float:
    return max((1e3 * (r.sent_s - r.due_s) for r in requests if r.sent_s), default=0.0)


def _percentiles(seconds: Iterable[float]) -> Percentiles:
    values = 1e3 * np.fromiter(seconds, np.float64)
    if not len(values):
        return {}
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "mean": float(values.mean()),
        "max": float(values.max()),
        "count": len(values),
    }

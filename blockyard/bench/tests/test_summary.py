from __future__ import annotations

import pytest

from blockyard.bench.load import LoadResult
from blockyard.bench.summary import summarise
from blockyard.bench.times import ChoiceTimes, RequestTimes


def choice(*messages: tuple[float, int]) -> ChoiceTimes:
    times = ChoiceTimes()
    for now_s, num_tokens in messages:
        times.add(num_tokens, now_s)
    return times


def test_time_per_token_begins_after_the_first_message() -> None:
    assert choice((1.0, 2), (2.0, 1), (3.0, 3)).token_time_s == pytest.approx(0.5)
    assert choice((1.0, 4)).token_time_s is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = RequestTimes(0, 100, due_s=10.0, sent_s=10.5, choices=[choice((11.0, 1), (12.0, 4))])
    first = RequestTimes(
        1,
        50,
        due_s=10.0,
        sent_s=10.0,
        choices=[choice((10.2, 1), (10.4, 1)), choice((10.3, 1), (15.0, 1))],
        num_cached_tokens=16,
    )
    failed = RequestTimes(2, 9, 10.0, 10.0, [choice((99.0, 1))], error="INTERNAL: no")
    summary = summarise(LoadResult(10.0, [late, first, failed], [0.5]))
    assert (summary.num_requests, summary.num_failed) == (3, 1)
    assert summary.errors == {"INTERNAL: no": 1}
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (150, 9)
    assert summary.num_cached_tokens == 16
    assert summary.duration_s == 5.0
    assert summary.requests_per_s == pytest.approx(0.4)
    assert summary.output_tokens_per_s == pytest.approx(1.8)
    assert summary.tokens_per_message == 1.5
    assert summary.ttft_ms["max"] == pytest.approx(1000)
    assert summary.ttft_ms["count"] == 2
    assert summary.e2e_ms["max"] == pytest.approx(5000)
    assert summary.tpot_ms["count"] == summary.itl_ms["count"] == 3
    assert summary.itl_ms["max"] == pytest.approx(4700)
    assert summary.max_send_lag_ms == pytest.approx(500)


def test_nothing_came() -> None:
    lost = RequestTimes(0, 9, 10.0, choices=[ChoiceTimes()], error="TIME_LIMIT: no")
    summary = summarise(LoadResult(10.0, [lost], [0.0]))
    assert summary.requests_per_s == summary.duration_s == 0
    assert summary.ttft_ms == {}

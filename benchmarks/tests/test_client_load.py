from __future__ import annotations

import math

import pytest

from benchmarks.client_load import (
    StreamTimes,
    decode_step_s,
    duration_s,
    largest_gap_s,
    median_gap_s,
)


def stream(start_s: float, gaps_s: list[float], counts: list[int] | None = None) -> StreamTimes:
    arrivals = [start_s]
    for gap_s in gaps_s:
        arrivals.append(arrivals[-1] + gap_s)
    counts = counts or [1] * len(arrivals)
    return StreamTimes(0.0, sum(counts), arrivals, counts)


def test_step_time_counts_only_while_all_decode() -> None:
    early = stream(1.0, [0.5] * 4 + [0.1] * 20)  # slow while the other still prefills
    late = stream(3.0, [0.1] * 20)
    assert decode_step_s([early, late]) == pytest.approx(0.1)


def test_step_time_counts_tokens_not_messages() -> None:
    merged = stream(1.0, [0.3] * 5, [1, 3, 3, 3, 3, 3])
    assert decode_step_s([merged]) == pytest.approx(0.1)


def test_streams_that_never_overlap_have_no_step_time() -> None:
    assert math.isnan(decode_step_s([stream(1.0, [0.1]), stream(5.0, [0.1])]))


def test_a_gap_belongs_to_the_moment_it_ends() -> None:
    times = stream(0.0, [0.1, 2.0, 0.1])  # arrivals 0, 0.1, 2.1, 2.2
    assert largest_gap_s(times, 1.0, 3.0) == pytest.approx(2.0)
    assert largest_gap_s(times, 2.15, 3.0) == pytest.approx(0.1)
    assert largest_gap_s(times, 5.0, 6.0) == 0


def test_durations() -> None:
    streams = [stream(1.0, [0.1]), stream(2.0, [0.3, 0.1])]
    assert duration_s(streams) == pytest.approx(2.4)
    assert median_gap_s(streams) == pytest.approx(0.1)
    assert streams[1].first_token_s == 2.0

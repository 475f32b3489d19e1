from __future__ import annotations

import pytest

from scheduler_svc.telemetry import buckets
from scheduler_svc.telemetry.histogram import Exemplar, Histogram


def test_other_bounds_cannot_be_added() -> None:
    histogram = Histogram((1.0, 2.0))
    with pytest.raises(ValueError, match="shorter"):
        histogram.add([1, 2], 3.0)
    assert (histogram.counts, histogram.sum) == ([0, 0, 0], 0)


def test_a_bucket_ends_with_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (-1, 1, 1.5, 2, 2.1):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == pytest.approx(5.6)


@pytest.mark.parametrize("value", [0.005, 0.01, 0.0101, 100.0])
def test_the_same_value_many_times_is_as_one_by_one(value: float) -> None:
    one_by_one, at_once = Histogram(buckets.INTER_TOKEN), Histogram(buckets.INTER_TOKEN)
    for _ in range(100):
        one_by_one.observe(value)
    at_once.observe_times(value, 100)
    assert at_once.counts == one_by_one.counts
    assert at_once.sum == pytest.approx(one_by_one.sum)


def test_increases_add_up_and_the_newest_exemplar_stays() -> None:
    total, part = Histogram((1.0,)), Histogram((1.0,))
    for trace_id in (b"old", b"new"):
        part.observe(0.5, trace_id)
        part.observe(0.25)
        total.add(part.counts, part.sum, part.exemplars)
        part.clear()
    assert (total.counts, total.sum) == ([4, 0], 1.5)
    assert total.exemplars[0].trace_id == b"new"
    assert (part.counts, part.sum, part.exemplars) == ([0, 0], 0, {})
    assert isinstance(total.exemplars[0], Exemplar)


@pytest.mark.parametrize("name", [name for name in vars(buckets) if name.isupper()])
def test_bounds_ascend(name: str) -> None:
    bounds = getattr(buckets, name)
    assert list(bounds) == sorted(set(bounds))


def test_values_counted_later_are_counted_alike() -> None:
    """On a bound, between two, beyond all; whenever somebody looks, and if nobody ever does."""
    now, later = Histogram([1, 2, 5]), Histogram([1, 2, 5])
    values = [0.5, 1, 1.5, 2, 2, 4, 5, 9, -1] * 300
    for number, value in enumerate(values, start=1):
        now.observe(value)
        later.observe_later(value)
        if number % 700 == 0:
            assert (later.counts, later.sum) == (now.counts, now.sum)
    assert len(later._later) < 600
    later.observe(3)
    now.observe(3)
    assert (later.counts, later.sum) == (now.counts, now.sum)
    later.observe_later(3)
    later.clear()
    assert (sum(later.counts), later.sum) == (0, 0)

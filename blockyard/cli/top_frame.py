"""What `blockyard top` shows: one snapshot, and what happened since the one before.

Pure text, at most 80 columns wide; colours only repeat what a character says already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import click

from blockyard.engine.v1 import engine_pb2 as pb

_WIDTH: Final = 80
_BAR_WIDTH: Final = 50
_UNKNOWN: Final = "-"


@dataclass(frozen=True, slots=True)
class Sample:
    """A snapshot, and when it came, on a clock that only goes forward [s]."""

    snapshot: pb.SnapshotResponse
    taken_s: float


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two samples of one engine process."""

    elapsed_s: float
    counters: pb.Counters
    """Differences."""


@dataclass(frozen=True, slots=True)
class _PoolClass:
    """A part of a pool as a bar shows it."""

    name: str
    num_slots: int
    mark: str
    color: str


def between(previous: Sample | None, sample: Sample) -> Interval | None:
    """The interval that ends with `sample`; None if the engine was not there all the while."""
    if previous is None:
        return None
    before, after = previous.snapshot.counters, sample.snapshot.counters
    changes = {
        field.name: getattr(after, field.name) - getattr(before, field.name)
        for field in pb.Counters.DESCRIPTOR.fields
    }
    elapsed_s = sample.taken_s - previous.taken_s
    if elapsed_s <= 0 or min(changes.values()) < 0:  # counters start again with the process
        return None
    return Interval(elapsed_s, pb.Counters(**changes))


def frame(title: str, sample: Sample, previous: Sample | None) -> list[str]:
    """The lines of one frame.

    Args:
        title: shown at the top, cut to the width.
        sample: what to show.
        previous: for rates; None: they are not known yet.
    """
    snapshot = sample.snapshot
    lines = [title[:_WIDTH], ""]
    if not snapshot.device.num_slots:
        return [*lines, "the engine waits for its first executor"]
    interval = between(previous, sample)
    return [
        *lines,
        *_work(snapshot, interval),
        "",
        *_device(snapshot.device),
        *_host(snapshot.host),
        "",
        *_memory(snapshot, interval),
    ]


def _work(snapshot: pb.SnapshotResponse, interval: Interval | None) -> list[str]:
    counters = snapshot.counters
    return [
        _columns(
            "queue",
            f"{_number(snapshot.num_running)} running",
            f"{_number(snapshot.num_waiting)} waiting",
            f"{_number(counters.num_finished)} finished",
        ),
        _columns(
            "tokens/s",
            f"{_rate(interval, 'num_prompt_tokens')} in",
            f"{_rate(interval, 'num_output_tokens')} out",
        ),
        _columns(
            "steps/s",
            _rate(interval, "num_steps"),
            f"step {_number(snapshot.step_id)}",
            f"{_number(counters.num_recoveries)} recoveries",
        ),
    ]


def _device(pool: pb.DevicePool) -> list[str]:
    classes = [
        _PoolClass("stored", pool.num_stored, "#", "green"),
        _PoolClass("in flight", pool.num_in_flight, "+", "cyan"),
        _PoolClass("unused", pool.num_unused, "x", "red"),
        _PoolClass("cached", pool.num_cached, "=", "blue"),
        _PoolClass("free", pool.num_free, ".", "bright_black"),
    ]
    return _bar("device", classes)


def _host(pool: pb.HostPool) -> list[str]:
    if not pool.num_slots:
        return [_columns("host", "no pool")]
    classes = [
        _PoolClass("swapped", pool.num_swapped, "#", "yellow"),
        _PoolClass("cached", pool.num_cached, "=", "blue"),
        _PoolClass("free", pool.num_free, ".", "bright_black"),
    ]
    return _bar("host", classes)


def _memory(snapshot: pb.SnapshotResponse, interval: Interval | None) -> list[str]:
    device, counters = snapshot.device, snapshot.counters
    held = device.num_stored + device.num_in_flight + device.num_unused
    saved = device.num_saved_by_sharing
    recent = interval.counters if interval else pb.Counters()
    return [
        _columns(
            "memory",
            f"{_percent(device.num_unused, held)} waste",
            f"{_number(saved)} slots saved by sharing",
            f"({_percent(saved, device.num_stored + saved)})",
        ),
        _columns(
            "cache",
            f"{_percent(_num_hits(recent), recent.num_queried_tokens)} hits",
            f"{_percent(_num_hits(counters), counters.num_queried_tokens)} since start",
        ),
        _columns(
            "preempt/s",
            f"{_rate(interval, 'num_preemptions_by_recompute')} recompute",
            f"{_rate(interval, 'num_preemptions_by_swap')} swap",
        ),
        _columns(
            "blocks/s",
            f"{_rate(interval, 'num_swapped_out')} swapped out",
            f"{_rate(interval, 'num_swapped_in')} swapped in",
            f"{_rate(interval, 'num_copied')} copied",
            f"{_rate(interval, 'num_evicted')} evicted",
        ),
    ]


def _num_hits(counters: pb.Counters) -> int:
    return counters.num_hit_tokens_device + counters.num_hit_tokens_host


def _bar(name: str, classes: list[_PoolClass]) -> list[str]:
    """A bar of exactly _BAR_WIDTH marks, and its legend."""
    total = sum(part.num_slots for part in classes)
    marks, legend = "", []
    below = 0
    for part in classes:
        # Rounding the edges, not the parts, keeps the width.
        start = below * _BAR_WIDTH // max(total, 1)
        below += part.num_slots
        end = below * _BAR_WIDTH // max(total, 1)
        marks += click.style(part.mark * (end - start), fg=part.color)
        share = _percent(part.num_slots, total)
        legend.append(f"{click.style(part.mark, fg=part.color)}{part.name} {share}")
    return [_columns(name, f"[{marks}]", f"{_number(total)} slots"), f"  {'  '.join(legend)}"]


def _columns(name: str, *items: str) -> str:
    return f"{name:10}{'  '.join(items)}"


def _rate(interval: Interval | None, counter: str) -> str:
    if interval is None:
        return _UNKNOWN
    return _number(getattr(interval.counters, counter) / interval.elapsed_s)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else _UNKNOWN


def _number(value: float) -> str:
    """A short form: 7 (an int), 7.3, 1,234, 56,789, 123.5k."""
    if isinstance(value, float) and value < 99.95:
        return f"{value:.1f}"
    if value < 99_999.5:
        return f"{value:,.0f}"
    units = iter("kMGTPE")
    unit = next(units)
    value /= 1000
    while value >= 999.95:
        value, unit = value / 1000, next(units)
    return f"{value:.1f}{unit}"

"""One frame as text: figures, rates, widths."""

from __future__ import annotations

import click
import pytest

from blockyard.cli.top_frame import Sample, between, frame
from blockyard.engine.v1 import engine_pb2 as pb


def snapshot(**counters: int) -> pb.SnapshotResponse:
    return pb.SnapshotResponse(
        step_id=12345,
        num_waiting=3,
        num_running=24,
        block_size=16,
        device=pb.DevicePool(
            num_slots=1616,
            num_stored=700,
            num_in_flight=20,
            num_unused=80,
            num_cached=320,
            num_free=480,
            num_padding=16,
            num_saved_by_sharing=100,
        ),
        host=pb.HostPool(num_slots=160, num_swapped=48, num_cached=32, num_free=80),
        counters=pb.Counters(**counters),
    )


def text(sample: Sample, previous: Sample | None = None) -> str:
    return click.unstyle("\n".join(frame("title", sample, previous)))


BEFORE = Sample(snapshot(num_queried_tokens=1000, num_hit_tokens_device=100), 10.0)
AFTER = Sample(
    snapshot(
        num_finished=7,
        num_recoveries=2,
        num_queried_tokens=1200,
        num_hit_tokens_device=150,
        num_hit_tokens_host=50,
        num_prompt_tokens=4000,
        num_output_tokens=100,
        num_steps=3,
        num_preemptions_by_recompute=1,
        num_preemptions_by_swap=4,
        num_swapped_out=200_000,
        num_swapped_in=250,
        num_copied=5,
        num_evicted=6,
    ),
    12.0,
)


def test_before_the_first_executor() -> None:
    shown = text(Sample(pb.SnapshotResponse(), 1.0))
    assert shown == "title\n\nthe engine waits for its first executor"


def test_without_a_previous_sample_rates_are_unknown() -> None:
    lines = text(AFTER).splitlines()
    assert "queue     24 running  3 waiting  7 finished" in lines
    assert "tokens/s  - in  - out" in lines
    assert "cache     - hits  16.7% since start" in lines


def test_figures_and_rates() -> None:
    assert text(AFTER, BEFORE).splitlines() == [
        "title",
        "",
        "queue     24 running  3 waiting  7 finished",
        "tokens/s  2,000 in  50.0 out",
        "steps/s   1.5  step 12,345  2 recoveries",
        "",
        f"device    [{'#' * 21}+xxx{'=' * 10}{'.' * 15}]  1,600 slots",
        "  #stored 43.8%  +in flight 1.2%  xunused 5.0%  =cached 20.0%  .free 30.0%",
        f"host      [{'#' * 15}{'=' * 10}{'.' * 25}]  160 slots",
        "  #swapped 30.0%  =cached 20.0%  .free 50.0%",
        "",
        "memory    10.0% waste  100 slots saved by sharing  (12.5%)",
        "cache     50.0% hits  16.7% since start",
        "preempt/s 0.5 recompute  2.0 swap",
        "blocks/s  100.0k swapped out  125 swapped in  2.5 copied  3.0 evicted",
    ]


def test_no_host_pool_and_nothing_held() -> None:
    shown = snapshot()
    shown.host.Clear()
    shown.device.CopyFrom(pb.DevicePool(num_slots=32, num_free=16, num_padding=16))
    lines = text(Sample(shown, 1.0)).splitlines()
    assert "host      no pool" in lines
    assert "memory    - waste  0 slots saved by sharing  (-)" in lines


@pytest.mark.parametrize("counter", ["num_steps", "num_output_tokens", "num_finished"])
def test_an_engine_that_started_again_gives_no_rates(counter: str) -> None:
    before = Sample(snapshot(**{counter: 5}), 1.0)
    after = Sample(snapshot(**{counter: 4}, num_copied=9), 2.0)
    assert between(before, after) is None
    assert between(after, Sample(after.snapshot, 3.0)) is not None


def test_no_time_between_two_samples_gives_no_rates() -> None:
    assert between(AFTER, AFTER) is None


@pytest.mark.parametrize("scale", [1, 999, 1009, 123_456, 10**9, 10**14])
def test_a_frame_fits_80_columns(scale: int) -> None:
    counters = {field.name: 99_999 * scale for field in pb.Counters.DESCRIPTOR.fields}
    shown = snapshot(**counters)
    shown.num_waiting = shown.num_running = 2**32 - 1
    shown.step_id = 2**64 - 1
    device = shown.device
    for field in device.DESCRIPTOR.fields:
        setattr(device, field.name, 99 * scale)
    lines = frame("t" * 200, Sample(shown, 1.0), Sample(snapshot(), 0.0))
    assert max(len(click.unstyle(line)) for line in lines) <= 80


@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (0, 0, 1, 0, 0), (997, 1, 1, 1, 3), (0,) * 5])
def test_bars_have_one_width_whatever_the_parts(parts: tuple[int, ...]) -> None:
    names = ("num_stored", "num_in_flight", "num_unused", "num_cached", "num_free")
    shown = snapshot()
    shown.device.CopyFrom(pb.DevicePool(num_slots=sum(parts) + 16, num_padding=16))
    for name, part in zip(names, parts, strict=True):
        setattr(shown.device, name, part)
    (bar,) = [line for line in text(Sample(shown, 1.0)).splitlines() if line.startswith("device")]
    marks = bar.partition("[")[2].partition("]")[0]
    assert len(marks) == (50 if sum(parts) else 0)

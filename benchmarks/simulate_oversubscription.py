"""More requests than memory: `python -m benchmarks.simulate_oversubscription`.

The pool holds what `max_num_seqs` requests of mean length come to, divided by a factor of 1.3, 2
and 8; all requests wait from the start. Throughput is compared with an oracle that knows every
output's length, reserves exactly that, and so never preempts. Then, at a factor of 2, the ways to
preempt: three links to the host, and block sizes from 8 to 128.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from benchmarks import report
from benchmarks.report import Target
from benchmarks.simulate_cases import PROFILE, Curves, draw, parser, run, start
from blockyard.simulate.device import DeviceProfile
from blockyard.simulate.setup import Sizes, make_setup
from blockyard.simulate.summary import Summary
from blockyard.simulate.trace import Trace

_FACTORS: Final = (1.3, 2.0, 8.0)
_LINKS: Final = {"12 GB/s": 12e9, "50 GB/s": 50e9, "400 GB/s": 400e9}
"""PCIe 3, PCIe 5 and a coherent CPU-GPU link, in round figures."""
_BLOCK_SIZES: Final = (8, 16, 32, 64, 128)
_MAX_NUM_SEQS: Final = 256
_HOST_PER_DEVICE: Final = 4
_NUM_REQUESTS: Final = 2000
_WAYS: Final = {
    "auto": ("auto", _HOST_PER_DEVICE),
    "recompute": ("recompute", _HOST_PER_DEVICE),
    "swap": ("swap", _HOST_PER_DEVICE),
    "no host pool": ("recompute", 0),
}
"""Name -> preemption mode, and host blocks for each device block."""
_OF_ORACLE: Final = 0.9
_MOST_PREEMPTIONS: Final = 3


def _growing() -> Trace:
    """Short prompts and long outputs of any length up to 1,023: most of the KV is growth."""
    outputs = np.random.default_rng(0).integers(1, 1024, _NUM_REQUESTS, dtype=np.int32)
    zeros = np.zeros(_NUM_REQUESTS, np.int64)
    return Trace("growing", zeros, np.full(_NUM_REQUESTS, 128, np.int32), outputs)


def _sizes(trace: Trace, factor: float, block_size: int, host_per_device: int) -> Sizes:
    num_tokens = _MAX_NUM_SEQS * trace.num_total_tokens.mean() / factor
    num_blocks = int(num_tokens / block_size)
    return Sizes(
        num_blocks,
        block_size=block_size,
        max_num_seqs=_MAX_NUM_SEQS,
        num_host_blocks=host_per_device * num_blocks,
    )


def _run(
    trace: Trace, factor: float, way: str, block_size: int = 16, profile: DeviceProfile = PROFILE
) -> Summary:
    preemption, host_per_device = _WAYS[way]
    sizes = _sizes(trace, factor, block_size, host_per_device)
    label = f"{trace.name} {factor:g}x, {way}, blocks of {block_size}"
    return run(label, trace, make_setup("blockyard", sizes, profile, preemption))


def _run_oracle(trace: Trace, factor: float) -> Summary:
    setup = make_setup("orca-oracle", _sizes(trace, factor, 16, 0), PROFILE)
    return run(f"{trace.name} {factor:g}x, oracle", trace, setup)


def _by_factor(trace: Trace) -> tuple[dict[str, Any], list[Target]]:
    """Every way to preempt, beside the oracle."""
    rows, results, targets = [], {}, []
    for factor in _FACTORS:
        oracle = _run_oracle(trace, factor)
        summaries = {way: _run(trace, factor, way) for way in _WAYS}
        for way, summary in summaries.items():
            of_oracle = summary.output_tokens_per_s / oracle.output_tokens_per_s
            rows.append((f"{factor:g}x, {way}", *_cells(summary), of_oracle))
        rows.append((f"{factor:g}x, oracle", *_cells(oracle), 1.0))
        results[f"{factor:g}"] = {
            name: asdict(summary) for name, summary in {**summaries, "oracle": oracle}.items()
        }
        chosen = summaries["auto"]
        of_oracle = chosen.output_tokens_per_s / oracle.output_tokens_per_s
        name = f"{trace.name}, {factor:g}x"
        targets += [
            Target(f"{name}: throughput / oracle's", of_oracle, ">=", _OF_ORACLE),
            Target(f"{name}: preemptions", chosen.max_preemptions, "<=", _MOST_PREEMPTIONS),
        ]
    report.print_table(f"{trace.name}, PCIe 5", (*_HEADERS, "of oracle"), rows)
    return results, targets


_HEADERS: Final = (
    *("", "output tok/s", "running", "recomputed", "swapped", "most of one", "blocks moved"),
)


def _cells(summary: Summary) -> tuple[object, ...]:
    return (
        summary.output_tokens_per_s,
        summary.mean_num_running,
        summary.preemptions_by_recompute,
        summary.preemptions_by_swap,
        summary.max_preemptions,
        summary.num_swapped_blocks,
    )


def _by_link(trace: Trace) -> dict[str, dict[str, dict[int, Summary]]]:
    """Link -> way to preempt -> block size -> figures, at a factor of 2."""
    figures: dict[str, dict[str, dict[int, Summary]]] = {}
    for link, rate in _LINKS.items():
        profile = replace(PROFILE, cost=replace(PROFILE.cost, swap_bytes_per_s=rate))
        figures[link] = {
            way: {size: _run(trace, 2.0, way, size, profile) for size in _BLOCK_SIZES}
            for way in _WAYS
        }
        rows = [
            (way, *(summary.output_tokens_per_s for summary in by_size.values()))
            for way, by_size in figures[link].items()
        ]
        title = f"{trace.name}, 2x, {link}: output tok/s by block size"
        report.print_table(title, ("", *map(str, _BLOCK_SIZES)), rows)
    return figures


def _worst_of_auto(figures: Mapping[str, Mapping[str, Mapping[int, Summary]]]) -> float:
    """The least throughput of `auto` beside the best way, over links and block sizes."""
    return min(
        by_way["auto"][size].output_tokens_per_s
        / max(by_size[size].output_tokens_per_s for by_size in by_way.values())
        for by_way in figures.values()
        for size in _BLOCK_SIZES
    )


def main() -> int:
    """Run the study; returns the exit code."""
    flags, trace = start(parser(__doc__, "azure", can_plot=True))
    traces = [_growing(), trace.take(_NUM_REQUESTS).all_at_once()]
    results: dict[str, Any] = {}
    targets: list[Target] = []
    for trace in traces:
        results[trace.name], found = _by_factor(trace)
        targets += found
    by_link = _by_link(traces[0])
    worst = _worst_of_auto(by_link)
    targets.append(Target("auto / the best way, worst case", worst, ">=", 0.97))
    results["by_link"] = {
        link: {
            way: {str(size): asdict(summary) for size, summary in by_size.items()}
            for way, by_size in by_way.items()
        }
        for link, by_way in by_link.items()
    }
    is_met = report.print_targets(targets)
    report.write("simulate_oversubscription", results, targets)
    if flags.plot:
        draw("simulate_oversubscription", _panels(by_link), "block size [tokens]", "output tok/s")
    return 0 if is_met else 1


def _panels(figures: Mapping[str, Mapping[str, Mapping[int, Summary]]]) -> dict[str, Curves]:
    return {
        link: {
            way: (list(by_size), [s.output_tokens_per_s for s in by_size.values()])
            for way, by_size in by_way.items()
        }
        for link, by_way in figures.items()
    }


if __name__ == "__main__":
    sys.exit(main())

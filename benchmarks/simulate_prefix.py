"""What the prefix cache finds: `python -m benchmarks.simulate_prefix`.

Conversations replayed as recorded on a simulated device, with pools of growing size: the device
pool alone, and the device pool of one GPU with a host pool behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks import report
from benchmarks.report import Target
from benchmarks.simulate_cases import KV_GIB, PROFILE, draw, parser, run, start
from blockyard.simulate.setup import Sizes, blocks_in, make_setup
from blockyard.simulate.summary import Summary
from blockyard.simulate.trace import Trace

_BLOCK_SIZE: Final = 16
_MAX_MODEL_LEN: Final = 131_072
_POOL_TOKENS: Final = tuple(1 << power for power in range(18, 26))
"""From a quarter of a million tokens to 33 million: more than the trace ever stores."""
_BOTH_TOKENS: Final = tuple(1 << power for power in (20, 22, 23, 24))
_OF_IDEAL: Final = 0.99

Figures = dict[int, Summary]
"""By the tokens that both pools hold together."""


def _run(trace: Trace, num_blocks: int, num_host_blocks: int = 0) -> Summary:
    sizes = Sizes(
        num_blocks,
        block_size=_BLOCK_SIZE,
        max_model_len=_MAX_MODEL_LEN,
        num_host_blocks=num_host_blocks,
    )
    label = f"{num_blocks:,} + {num_host_blocks:,} blocks"
    return run(label, trace, make_setup("blockyard", sizes, PROFILE))


def _device_alone(trace: Trace) -> Figures:
    return {tokens: _run(trace, tokens // _BLOCK_SIZE) for tokens in _POOL_TOKENS}


def _with_host(trace: Trace) -> Figures:
    """The device pool stays that of one GPU; the host pool is what is above."""
    num_device = blocks_in(KV_GIB, _BLOCK_SIZE, PROFILE)
    return {
        tokens: _run(trace, num_device, tokens // _BLOCK_SIZE - num_device)
        for tokens in _BOTH_TOKENS
    }


def _print(title: str, figures: Figures) -> None:
    rows = [
        (
            f"{tokens:,}",
            100 * s.cache_hit_ratio,
            s.hit_tokens_device,
            s.hit_tokens_host,
            s.ttft_ms.p50 / 1e3,
            s.preemptions_by_recompute,
            s.preemptions_by_swap,
        )
        for tokens, s in figures.items()
    ]
    headers = ("pool tokens", "hit %", "device", "host", "TTFT p50 s", "recomputed", "swapped")
    report.print_table(title, headers, rows)


def main() -> int:
    """Run the study; returns the exit code."""
    flags, trace = start(parser(__doc__, "mooncake", can_plot=True))
    ideal = trace.ideal_hit_ratio()
    curves = {"device alone": _device_alone(trace), "device + host": _with_host(trace)}
    for title, figures in curves.items():
        _print(f"{trace.name}, {title}; ideal {ideal:.2%}", figures)
    largest = curves["device alone"][max(_POOL_TOKENS)].cache_hit_ratio
    targets = [Target("hit ratio of the largest pool / ideal", largest / ideal, ">=", _OF_IDEAL)]
    is_met = report.print_targets(targets)
    results: dict[str, Any] = {"trace": trace.name, "ideal_hit_ratio": ideal}
    for title, figures in curves.items():
        results[title] = {str(tokens): asdict(summary) for tokens, summary in figures.items()}
    report.write("simulate_prefix", results, targets)
    if flags.plot:
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            title: (list(figures), [100 * s.cache_hit_ratio for s in figures.values()])
            for title, figures in curves.items()
        }
        lines[f"ideal {ideal:.1%}"] = (_POOL_TOKENS, [100 * ideal] * len(_POOL_TOKENS))
        draw("simulate_prefix", {trace.name: lines}, "tokens in both pools", "prompt tokens hit %")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

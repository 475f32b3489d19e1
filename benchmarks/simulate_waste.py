"""KV memory held and not used, by policy: `python -m benchmarks.simulate_waste`.

The scheduler of the service serves an hour of conversation traffic, all of it waiting from the
start, on a simulated device; waste is read from the live block tables at every step. The other
systems' ways to reserve memory are policies of the same scheduler.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Final

from benchmarks import report
from benchmarks.report import Target
from benchmarks.simulate_cases import KV_GIB, PROFILE, parser, run, start
from blockyard.simulate.policies import POLICY_NAMES
from blockyard.simulate.setup import Setup, Sizes, blocks_in, make_setup
from blockyard.simulate.summary import Summary, short_prompt_waste
from blockyard.simulate.trace import Trace

_MAX_MODEL_LENS: Final = (2048, 8192)
"""2,048 as in the PagedAttention paper; 8,192 holds all requests of the trace but one."""
_MAX_NUM_SEQS: Final = 1024
"""So many that memory bounds the batch."""
_BLOCK_SIZES: Final = (8, 16, 32, 64, 128)
_WASTE_LIMIT: Final = 0.01


def _setup(policy: str, block_size: int, max_model_len: int) -> Setup:
    num_blocks = blocks_in(KV_GIB, block_size, PROFILE)
    sizes = Sizes(
        num_blocks,
        block_size=block_size,
        max_num_seqs=_MAX_NUM_SEQS,
        max_model_len=max_model_len,
    )
    return make_setup(policy, sizes, PROFILE)


def _by_policy(trace: Trace, max_model_len: int) -> dict[str, Any]:
    """Print and return the figures of every policy, and of a short prompt under it."""
    rows, results = [], {}
    for policy in POLICY_NAMES:
        setup = _setup(policy, 16, max_model_len)
        summary, short = run(policy, trace, setup), short_prompt_waste(setup)
        rows.append((policy, *_cells(summary), *(100 * waste for waste in short.values())))
        results[policy] = {**asdict(summary), "short_prompt_waste": short}
    report.print_table(
        f"{trace.name}, at most {max_model_len:,} tokens a request, {KV_GIB:g} GiB of KV",
        (*_HEADERS, *(f"17 + {n} tokens %" for n in short)),
        rows,
    )
    return results


_HEADERS: Final = (
    *("", "served", "waste pooled %", "mean %", "p99 %", "running", "output tok/s", "preempted"),
)


def _cells(summary: Summary) -> tuple[object, ...]:
    return (
        summary.num_requests,
        100 * summary.waste_pooled,
        100 * summary.waste_request_mean,
        100 * summary.waste_request_p99,
        summary.mean_num_running,
        summary.output_tokens_per_s,
        summary.preemptions_by_recompute + summary.preemptions_by_swap,
    )


def _by_block_size(trace: Trace) -> dict[str, Any]:
    """Print and return the figures of the service's own policy for several block sizes."""
    summaries = {
        size: run(f"blocks of {size}", trace, _setup("blockyard", size, max(_MAX_MODEL_LENS)))
        for size in _BLOCK_SIZES
    }
    rows = [(str(size), *_cells(summary)) for size, summary in summaries.items()]
    report.print_table("by block size, all requests", _HEADERS, rows)
    return {str(size): asdict(summary) for size, summary in summaries.items()}


def main() -> int:
    """Run the study; returns the exit code."""
    _, trace = start(parser(__doc__, "azure"))
    trace = trace.all_at_once()
    by_policy = {str(length): _by_policy(trace, length) for length in _MAX_MODEL_LENS}
    by_block_size = _by_block_size(trace)
    targets = [
        Target(
            f"pooled waste, at most {length} tokens a request",
            figures["blockyard"]["waste_pooled"],
            "<=",
            _WASTE_LIMIT,
        )
        for length, figures in by_policy.items()
    ]
    is_met = report.print_targets(targets)
    results = {"trace": trace.name, "by_policy": by_policy, "by_block_size": by_block_size}
    report.write("simulate_waste", results, targets)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

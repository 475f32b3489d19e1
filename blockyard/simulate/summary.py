"""What a simulation comes to: a few figures, as a JSON object and as a column of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.simulate.run import Outcome, simulate
from blockyard.simulate.setup import Setup
from blockyard.simulate.trace import NS_PER_S, Trace

SHORT_PROMPT_TOKENS: Final = 17
"""The counter-case to a small average waste: one token more than a block of 16 holds."""
SHORT_OUTPUT_TOKENS: Final = (1, 16, 128)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one time over all requests [ms]."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values_ns: npt.NDArray[np.number]) -> Percentiles:
        """Of values [n]; all 0 if there are none."""
        if not len(values_ns):
            return cls(0.0, 0.0, 0.0)
        return cls(*(np.percentile(values_ns, (50, 95, 99)) / 1e6).tolist())


@dataclass(frozen=True, slots=True)
class Summary:
    """One simulation in figures. Ratios are 0 to 1; see docs/simulation.md for definitions."""

    num_requests: int
    num_skipped: int
    duration_s: float  # from the first arrival to the last token
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompts included, cached or not
    ttft_ms: Percentiles  # from arrival to first token
    tpot_ms: Percentiles  # mean time of each output token but the first, by request
    latency_ms: Percentiles  # from arrival to last token
    num_steps: int
    device_busy: float
    mean_num_running: float
    preemptions_by_recompute: int
    preemptions_by_swap: int
    max_preemptions: int  # of any request
    cache_hit_ratio: float  # prompt tokens found at first admission
    hit_tokens_device: int
    hit_tokens_host: int
    num_swapped_blocks: int  # moved between the pools, both ways
    waste_pooled: float  # slot time held and unused / slot time held
    waste_request_mean: float  # mean of the requests' own
    waste_request_p99: float
    in_flight_share: float  # of the slot time held: being written by plans under way
    pool_occupancy: float  # held slots / all slots, over time
    wall_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The same requests under several policies."""

    trace_name: str
    num_requests: int
    ideal_hit_ratio: float  # 0 also if the trace has no block ids
    profile: str
    num_blocks: int
    block_size: int
    num_host_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    window: int
    policies: dict[str, Summary]
    short_prompt_waste: dict[str, dict[int, float]]  # by policy and number of output tokens


def make_report(trace: Trace, outcomes: Mapping[str, Outcome]) -> Report:
    """Put together what simulations of `trace`, with the same sizes, came to."""
    setup = next(iter(outcomes.values())).setup
    limits = setup.limits
    return Report(
        trace_name=trace.name,
        num_requests=len(trace),
        ideal_hit_ratio=trace.ideal_hit_ratio(),
        profile=setup.profile.name,
        num_blocks=limits.num_usable_blocks,
        block_size=limits.block_size,
        num_host_blocks=limits.num_host_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        window=setup.window,
        policies={name: summarise(outcome) for name, outcome in outcomes.items()},
        short_prompt_waste={
            name: short_prompt_waste(outcome.setup) for name, outcome in outcomes.items()
        },
    )


def summarise(outcome: Outcome) -> Summary:
    """The figures of one simulation."""
    trace, served, meter = outcome.trace, outcome.served, outcome.meter
    limits, counters = outcome.setup.limits, outcome.final.counters
    duration_ns = int(served.finish_ns.max() - trace.arrival_ns[0])
    duration_s = duration_ns / NS_PER_S
    latency_ns = served.finish_ns - trace.arrival_ns
    num_gaps = trace.num_output_tokens - 1
    decode_ns = served.finish_ns - served.first_token_ns
    waste = meter.unused_by_request / meter.held_by_request
    num_prompt_tokens = int(trace.num_prompt_tokens.sum(dtype=np.int64))
    num_output_tokens = int(trace.num_output_tokens.sum(dtype=np.int64))
    pool_slots = limits.num_usable_blocks * limits.block_size
    return Summary(
        num_requests=len(trace),
        num_skipped=outcome.num_skipped,
        duration_s=duration_s,
        requests_per_s=len(trace) / duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        total_tokens_per_s=(num_prompt_tokens + num_output_tokens) / duration_s,
        ttft_ms=Percentiles.of(served.first_token_ns - trace.arrival_ns),
        tpot_ms=Percentiles.of(decode_ns[num_gaps > 0] / num_gaps[num_gaps > 0]),
        latency_ms=Percentiles.of(latency_ns),
        num_steps=outcome.num_steps,
        device_busy=outcome.busy_ns / duration_ns,
        mean_num_running=meter.num_running_time / duration_ns,
        preemptions_by_recompute=counters.num_preemptions_by_recompute,
        preemptions_by_swap=counters.num_preemptions_by_swap,
        max_preemptions=int(served.num_preemptions.max()),
        cache_hit_ratio=int(served.num_cached_tokens.sum(dtype=np.int64)) / num_prompt_tokens,
        hit_tokens_device=counters.num_hit_tokens_device,
        hit_tokens_host=counters.num_hit_tokens_host,
        num_swapped_blocks=counters.num_swapped_out + counters.num_swapped_in,
        waste_pooled=meter.unused / meter.held,
        waste_request_mean=float(waste.mean()),
        waste_request_p99=float(np.percentile(waste, 99)),
        in_flight_share=meter.in_flight / meter.held,
        pool_occupancy=meter.held / (pool_slots * duration_ns),
        wall_s=outcome.wall_s,
    )


def short_prompt_waste(setup: Setup) -> dict[int, float]:
    """Waste of one request of SHORT_PROMPT_TOKENS alone, by its output tokens, where it fits."""
    waste = {}
    for num_output_tokens in SHORT_OUTPUT_TOKENS:
        if SHORT_PROMPT_TOKENS + num_output_tokens > setup.limits.max_total_tokens:
            break
        lone = Trace(
            "one short request",
            np.zeros(1, np.int64),
            np.array([SHORT_PROMPT_TOKENS], np.int32),
            np.array([num_output_tokens], np.int32),
        )
        meter = simulate(lone, replace(setup, window=1)).meter
        waste[num_output_tokens] = meter.unused / meter.held
    return waste


def table(summaries: Mapping[str, Summary]) -> str:
    """The figures as aligned text, one column for each named summary."""
    columns = [_lines(summary) for summary in summaries.values()]
    rows = [["", *summaries]]
    rows += [[label, *(column[label] for column in columns)] for label in columns[0]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _lines(s: Summary) -> dict[str, str]:
    return {
        "requests served (skipped)": f"{s.num_requests:,} ({s.num_skipped:,})",
        "virtual time": f"{s.duration_s:,.1f} s",
        "requests/s": f"{s.requests_per_s:,.2f}",
        "output tokens/s": f"{s.output_tokens_per_s:,.0f}",
        "all tokens/s": f"{s.total_tokens_per_s:,.0f}",
        "TTFT p50 / p95 / p99 [ms]": _times(s.ttft_ms, 0),
        "TPOT p50 / p95 / p99 [ms]": _times(s.tpot_ms, 1),
        "end to end p50 / p95 / p99 [s]": _times(s.latency_ms, 2, 1e3),
        "steps": f"{s.num_steps:,}",
        "device busy": _percent(s.device_busy),
        "mean requests running": f"{s.mean_num_running:,.1f}",
        "preempted: recomputed / swapped": (
            f"{s.preemptions_by_recompute:,} / {s.preemptions_by_swap:,}"
        ),
        "most preemptions of a request": f"{s.max_preemptions}",
        "prompt tokens cached": _percent(s.cache_hit_ratio),
        "KV waste, pooled": _percent(s.waste_pooled),
        "KV waste, mean of requests": _percent(s.waste_request_mean),
        "KV waste, p99 of requests": _percent(s.waste_request_p99),
        "KV being written": _percent(s.in_flight_share),
        "pool held": _percent(s.pool_occupancy),
        "simulated in": f"{s.wall_s:,.1f} s",
    }


def _times(times: Percentiles, digits: int, divisor: float = 1.0) -> str:
    values = (times.p50, times.p95, times.p99)
    return " / ".join(f"{value / divisor:,.{digits}f}" for value in values)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2f} %"

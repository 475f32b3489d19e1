"""One measurement: the workload is made, warmed up for, sent, and summed up."""

from __future__ import annotations

import datetime
import shlex
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from blockyard.bench.environment import machine, versions, without_folders
from blockyard.bench.load import Target, Watch, run_load
from blockyard.bench.summary import Percentiles, Summary, summarise
from blockyard.bench.workload import (
    STEP_OUTPUT_TOKENS,
    Workload,
    WorkloadError,
    WorkloadSpec,
    make_workload,
)
from blockyard.client import Endpoint, ModelInfo
from blockyard.simulate.trace import Trace

_MODEL_TIMEOUT_S: Final = 30.0
_WARM_UP_PROMPT_TOKENS: Final = 64
_WARM_UP_OUTPUT_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Options:
    """Which server is measured, and how."""

    server: Endpoint
    num_clients: int = 1
    vocab_size: int | None = None
    """Prompts have ids below it; None: the model's."""
    num_warm_ups: int = 0
    """Short requests before the measurement."""
    time_limit_s: float | None = None
    """Of each load [s]; what has not ended then counts as failed."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What L shows, from the durations with 257 outputs and with one."""

    tpot_ms: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured of which server."""

    workload: str
    source: str
    num_skipped: int
    """Requests of the workload that are longer than the server takes."""
    model: ModelInfo
    load: Summary
    prefill: Summary | None = None
    """Of L: the same number of requests with one output token."""
    steps: StepTimes | None = None
    """Of L."""

    @property
    def num_failed(self) -> int:
        """Of all requests sent."""
        return self.load.num_failed + (self.prefill.num_failed if self.prefill else 0)

    def document(self, spec: WorkloadSpec, options: Options) -> dict[str, Any]:
        """As JSON values, with what is needed to repeat it."""
        path = spec.trace_path
        return {
            "workload": self.workload,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(map(without_folders, sys.argv)),
            "machine": machine(),
            "versions": versions(),
            "spec": {**asdict(spec), "trace_path": path and path.name},
            "options": {
                "server": options.server.address,
                "num_clients": options.num_clients,
                "vocab_size": options.vocab_size,
                "num_warm_ups": options.num_warm_ups,
                "time_limit_s": options.time_limit_s,
            },
            **asdict(self),
        }


@dataclass(frozen=True, slots=True)
class Phase:
    """A load that is about to start."""

    name: str
    num_requests: int


Begin = Callable[[Phase], Watch]
"""Called before each load; returns what is told of its progress."""


def measure(spec: WorkloadSpec, options: Options, begin: Begin | None = None) -> Report:
    """Replay the workload. Blocks.

    Raises WorkloadError, TraceError, LoadError, and BlockyardError if there is no server.
    """
    begin = begin or (lambda _phase: lambda _progress: None)
    whole = make_workload(spec)
    with options.server.client(_MODEL_TIMEOUT_S) as client:
        model = client.model()
    workload = whole.fitting(model.max_model_len)
    num_skipped = len(whole.trace) - len(workload.trace)
    if not len(workload.trace):
        raise WorkloadError(
            f"no request of {whole.name} fits: prompt and output may have {model.max_model_len} "
            "tokens together; serve with a larger --max-model-len"
        )
    target = Target(
        options.server,
        options.vocab_size or model.vocab_size,
        options.num_clients,
        _seed_of(workload.name, spec.seed),
        options.time_limit_s,
    )
    if options.num_warm_ups:
        warm_up = _warm_up(min(options.num_warm_ups, 1024), model.max_model_len)
        phase = begin(Phase("warm-up", options.num_warm_ups))
        run_load(warm_up, replace(target, seed=_seed_of("warm-up", spec.seed)), phase)
    load = summarise(run_load(workload, target, begin(_phase(workload))))
    report = Report(workload.name, workload.source, num_skipped, model, load)
    if spec.kind != "L":
        return report
    prefill = workload.with_outputs(1)
    target = replace(target, seed=_seed_of(prefill.name + " prefill", spec.seed))
    one = summarise(run_load(prefill, target, begin(_phase(prefill, ", one output token"))))
    return replace(report, prefill=one, steps=_step_times(load, one))


def _seed_of(name: str, seed: int) -> int:
    """Every load has its own prompts, or a later one would find them in the prefix cache."""
    return zlib.crc32(f"{name} {seed}".encode())


def _phase(workload: Workload, note: str = "") -> Phase:
    return Phase(workload.name + note, len(workload.trace))


def _step_times(load: Summary, one: Summary) -> StepTimes | None:
    """None if a request of either load failed: durations then say nothing."""
    if load.num_failed or one.num_failed or one.duration_s <= 0:
        return None
    tpot_s = (load.duration_s - one.duration_s) / (STEP_OUTPUT_TOKENS - 1)
    return StepTimes(1e3 * tpot_s, one.num_prompt_tokens / one.duration_s)


def _warm_up(count: int, max_model_len: int) -> Workload:
    num_prompt_tokens = max(1, min(_WARM_UP_PROMPT_TOKENS, max_model_len - _WARM_UP_OUTPUT_TOKENS))
    trace = Trace(
        "warm-up",
        np.zeros(count, np.int64),
        np.full(count, num_prompt_tokens, np.int32),
        np.full(count, min(_WARM_UP_OUTPUT_TOKENS, max_model_len - 1), np.int32),
    )
    return Workload("warm-up", trace, "")


# ---- for people


def table(report: Report) -> str:
    """The figures as aligned lines."""
    load = report.load
    lines = [
        f"{report.workload}: {load.num_requests:,} requests, {report.source}",
        f"{report.model.name} on {report.model.device or 'an unnamed device'}",
        "",
        *_line("duration", f"{load.duration_s:,.2f} s"),
        *_line("requests", f"{load.requests_per_s:,.2f} /s"),
        *_line("output tokens", f"{load.output_tokens_per_s:,.0f} /s"),
        *_line("prompt and output tokens", f"{load.total_tokens_per_s:,.0f} /s"),
    ]
    if report.steps is not None:
        lines += _line("time per step", f"{report.steps.tpot_ms:,.2f} ms")
        lines += _line("prefill", f"{report.steps.prefill_tokens_per_s:,.0f} tokens/s")
    columns = ("p50", "p90", "p99", "mean", "max")
    lines += ["", f"{'ms':8}" + "".join(f"{name:>11}" for name in columns)]
    for name, found in (
        ("TTFT", load.ttft_ms),
        ("TPOT", load.tpot_ms),
        ("ITL", load.itl_ms),
        ("E2E", load.e2e_ms),
    ):
        lines.append(f"{name:8}" + "".join(_cell(found, column) for column in columns))
    return "\n".join(lines + _remarks(report))


def _line(name: str, value: str) -> list[str]:
    return [f"{name:26}{value:>18}"]


def _cell(found: Percentiles, column: str) -> str:
    return f"{found[column]:11,.2f}" if found else f"{'-':>11}"


def _remarks(report: Report) -> list[str]:
    """What a reader must know to trust the figures."""
    loads = [load for load in (report.load, report.prefill) if load is not None]
    remarks = []
    if report.num_skipped:
        remarks.append(f"{report.num_skipped:,} requests left out: longer than the server takes")
    for load in loads:
        remarks += [f"{count:,} failed: {error}" for error, count in load.errors.items()]
    if num_cached := sum(load.num_cached_tokens for load in loads):
        remarks.append(
            f"{num_cached:,} prompt tokens were cached; a seed that this server has not seen "
            "makes other prompts"
        )
    if num_preemptions := sum(load.num_preemptions for load in loads):
        remarks.append(f"{num_preemptions:,} preemptions")
    busiest = max((cores for load in loads for cores in load.client_cores), default=0.0)
    if busiest > 0.8:
        remarks.append(f"a client used {busiest:.0%} of a core: take more --clients")
    return ["", *remarks] if remarks else []

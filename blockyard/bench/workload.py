"""The workloads: which requests, when they arrive, and how they are sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from blockyard.simulate.generator import generate
from blockyard.simulate.trace import NS_PER_S, Trace, TraceError
from blockyard.simulate.trace_files import read_trace

Arrivals = Literal["all", "poisson", "trace"]
ARRIVALS: Final[tuple[Arrivals, ...]] = ("all", "poisson", "trace")

STEP_OUTPUT_TOKENS: Final = 257
"""Of each request of L; its TPOT comes from this many outputs and from one."""

_W1_REQUESTS: Final = 1000
_W1_MAX_TOTAL_TOKENS: Final = 8192
_A_SECONDS: Final = 40
_MANY: Final = 2000  # requests generated where no number is given


class WorkloadError(Exception):
    """A workload that cannot be made; the message names the option."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to replay. None: what the workload's definition says."""

    kind: str
    """One of WORKLOADS."""
    trace_path: Path | None = None
    """The requests of W1, A and trace; None: generated ones with a public trace's statistics."""
    num_requests: int | None = None
    batch: int | None = None
    """Requests of L."""
    rate: float | None = None
    """Mean arrivals [requests/s]."""
    arrivals: Arrivals | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    """Of generated requests, of Poisson arrivals, of prompts and of sampling."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests ready to be sent: random prompts, outputs of a forced length."""

    name: str
    trace: Trace
    source: str
    """Where lengths and arrivals come from, for people."""
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    def fitting(self, max_model_len: int) -> Workload:
        """Without the requests that are longer than the server takes [tokens]."""
        return replace(self, trace=self.trace.fitting(max_model_len))

    def with_outputs(self, num_output_tokens: int) -> Workload:
        """The same prompts with another number of output tokens each."""
        lengths = np.full_like(self.trace.num_output_tokens, num_output_tokens)
        return replace(self, trace=replace(self.trace, num_output_tokens=lengths))


def make_workload(spec: WorkloadSpec) -> Workload:
    """The workload that `spec` describes. Raises WorkloadError, TraceError."""
    if spec.kind not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise WorkloadError(f"unknown workload {spec.kind!r}; it is one of {known}")
    _check_options(spec)
    workload = WORKLOADS[spec.kind](spec)
    return replace(
        workload,
        trace=_arriving(workload.trace, spec),
        temperature=workload.temperature if spec.temperature is None else spec.temperature,
        top_p=workload.top_p if spec.top_p is None else spec.top_p,
    )


def _check_options(spec: WorkloadSpec) -> None:
    if (spec.batch is not None) != (spec.kind == "L"):
        raise WorkloadError("--batch goes with workload L, which needs it")
    if spec.kind == "A" and spec.rate is None:
        raise WorkloadError("workload A needs --rate")
    if spec.trace_path is not None and spec.kind not in ("W1", "A", "trace"):
        raise WorkloadError(f"workload {spec.kind} needs no --trace: all its requests are alike")
    if spec.kind in ("L", "W2", "N4") and spec.arrivals == "trace":
        raise WorkloadError(f"workload {spec.kind} has no arrival times: --arrivals all or poisson")
    if spec.kind == "L" and (spec.arrivals == "poisson" or spec.num_requests is not None):
        raise WorkloadError("the requests of workload L are --batch many, all at once")
    if spec.arrivals == "poisson" and spec.rate is None:
        raise WorkloadError("--arrivals poisson needs --rate")


def _arriving(trace: Trace, spec: WorkloadSpec) -> Trace:
    """The requests with the arrivals asked for."""
    arrivals = spec.arrivals or ("trace" if spec.kind in ("A", "trace") else "all")
    if arrivals == "all":
        if spec.rate is not None:
            raise WorkloadError("--rate goes with --arrivals poisson or trace")
        return trace.all_at_once()
    if spec.rate is None:
        return trace
    if arrivals == "trace":
        return trace.at_rate(spec.rate)
    gaps_s = np.random.default_rng(spec.seed).exponential(1 / spec.rate, len(trace))
    gaps_s[0] = 0
    return replace(trace, arrival_ns=np.rint(np.cumsum(gaps_s) * NS_PER_S).astype(np.int64))


# ---- the workloads


def _w1(spec: WorkloadSpec) -> Workload:
    count = spec.num_requests or _W1_REQUESTS
    trace, source = _conversations(spec, count)
    return Workload("W1", trace.fitting(_W1_MAX_TOTAL_TOKENS).take(count), source)


def _w2(spec: WorkloadSpec) -> Workload:
    return _equal("W2", spec.num_requests or 1024, 128, 512)


def _l(spec: WorkloadSpec) -> Workload:
    assert spec.batch is not None
    return _equal(f"L({spec.batch})", spec.batch, 1024, STEP_OUTPUT_TOKENS)


def _n4(spec: WorkloadSpec) -> Workload:
    equal = _equal("N4", spec.num_requests or 128, 512, 256)
    return replace(equal, num_samples=4, temperature=1.0)


def _a(spec: WorkloadSpec) -> Workload:
    assert spec.rate is not None
    count = spec.num_requests or max(2, round(_A_SECONDS * spec.rate))
    trace, source = _conversations(spec, count + 1)
    # The public trace's first request comes long before its second.
    later = trace.select(np.arange(1, len(trace))) if len(trace) > 1 else trace
    return Workload(f"A({spec.rate:g})", later.take(count), source)


def _trace(spec: WorkloadSpec) -> Workload:
    trace, source = _conversations(spec, spec.num_requests or _MANY)
    return Workload("trace", trace.take(spec.num_requests or len(trace)), source)


WORKLOADS: Final[dict[str, Callable[[WorkloadSpec], Workload]]] = {
    "W1": _w1,
    "W2": _w2,
    "L": _l,
    "N4": _n4,
    "A": _a,
    "trace": _trace,
}
"""Name -> what makes it, with the arrivals of the trace or none."""


def _conversations(spec: WorkloadSpec, count: int) -> tuple[Trace, str]:
    """The file's requests, or `count` generated ones and a few to choose from; and their source."""
    if spec.trace_path is not None:
        trace = read_trace(spec.trace_path)
        if not len(trace):
            raise TraceError(f"{spec.trace_path}: no requests")
        return trace, spec.trace_path.name
    trace = generate("azure", count + count // 100 + 1, spec.seed)
    return trace, f"generated, with the statistics of azure_conv_2023 (seed {spec.seed})"


def _equal(name: str, count: int, num_prompt_tokens: int, num_output_tokens: int) -> Workload:
    trace = Trace(
        name,
        np.zeros(count, np.int64),
        np.full(count, num_prompt_tokens, np.int32),
        np.full(count, num_output_tokens, np.int32),
    )
    source = f"{num_prompt_tokens} prompt and {num_output_tokens} output tokens each"
    return Workload(name, trace, source)

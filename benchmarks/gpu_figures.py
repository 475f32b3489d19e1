"""What a session on a GPU is held against: vLLM's figures, and how near or far ours must be.

vLLM 0.26.0 on an NVIDIA H100 80GB HBM3 (torch 2.11, CUDA 13.0), bf16, random weights, default
settings with CUDA graphs and torch.compile, prefix caching off. In one process, without a server
or streams; A(r) with its AsyncLLM. They hold on that kind of GPU only, for prompts computed whole:
whatever ran elsewhere, or found tokens in the prefix cache, is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from benchmarks.report import Target

Json = Mapping[str, Any]

DEVICE: Final = "H100 80GB HBM3"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of vLLM's, where ours is in a workload's report, and what must be reached."""

    path: str
    """Into the report, e.g. "load.requests_per_s"."""
    value: float
    better: Literal["more", "less"]
    min_share: float | None = None
    """Least `speed`: 1 is as fast as vLLM, more is better; None: no target."""

    def speed(self, ours: float) -> float:
        """How much faster `ours` is."""
        if self.better == "more":
            return ours / self.value
        return self.value / ours if ours else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours beside vLLM's. `speed` above 1 is better, for rates and for times."""

    model: str
    workload: str
    what: str
    ours: float
    vllm: float
    speed: float
    min_speed: float | None


_LLAMA_8B_STEP_MS: Final = {1: 6.55, 8: 7.07, 32: 8.60, 64: 10.30, 128: 14.11, 256: 22.15}
_LLAMA_8B_PREFILL: Final = {1: 36.7e3, 32: 45.0e3, 256: 43.5e3}
_LLAMA_8B_LOADED_MS: Final = {  # rate -> TTFT p50, p90, p99, TPOT p50, p90, p99
    4: (44, 90, 140, 8.0, 9.8, 11.9),
    8: (55, 106, 174, 10.3, 12.6, 13.7),
    12: (69, 140, 199, 13.7, 17.3, 21.5),
    16: (90, 198, 385, 20.1, 24.4, 30.9),
}
_MIN_SHARE: Final = 0.75
_MIN_SMALL_SHARE: Final = 0.9
_MAX_LOADED: Final = 1.3
MAX_SMOLLM_STEP_MS: Final = 1.6
MAX_START_S: Final = 30.0
MAX_WARM_START_S: Final = 15.0


def _step(value: float, min_share: float | None) -> Figure:
    return Figure("steps.tpot_ms", value, "less", min_share)


def _prefill(value: float) -> Figure:
    return Figure("steps.prefill_tokens_per_s", value, "more")


def _requests(value: float, min_share: float | None) -> Figure:
    return Figure("load.requests_per_s", value, "more", min_share)


def _output(value: float, min_share: float | None = None) -> Figure:
    return Figure("load.output_tokens_per_s", value, "more", min_share)


def _loaded(values: tuple[float, ...]) -> list[Figure]:
    paths = [f"load.{what}_ms.{p}" for what in ("ttft", "tpot") for p in ("p50", "p90", "p99")]
    return [
        Figure(path, value, "less", None if path.endswith("p90") else 1 / _MAX_LOADED)
        for path, value in zip(paths, values, strict=True)
    ]


FIGURES: Final[dict[str, dict[str, list[Figure]]]] = {
    "llama-8b": {
        "W1": [_requests(20.0, _MIN_SHARE), _output(4948)],
        "W1 sampled": [_requests(17.6, None)],
        "W2": [_output(14146, _MIN_SHARE)],
        "N4": [_output(9725, _MIN_SHARE)],
        **{
            f"L({batch})": [
                _step(value, _MIN_SHARE),
                *([_prefill(_LLAMA_8B_PREFILL[batch])] if batch in _LLAMA_8B_PREFILL else []),
            ]
            for batch, value in _LLAMA_8B_STEP_MS.items()
        },
        **{f"A({rate})": _loaded(values) for rate, values in _LLAMA_8B_LOADED_MS.items()},
    },
    "llama-1b": {
        "W1": [_requests(79.9, _MIN_SMALL_SHARE), _output(19765)],
        "L(1)": [_step(1.70, None), _prefill(81e3)],
    },
    "smollm-135m": {
        "W1": [_requests(105.4, _MIN_SMALL_SHARE), _output(26054)],
        "L(1)": [_step(2.26, 2.26 / MAX_SMOLLM_STEP_MS), _prefill(39e3)],
    },
}
"""By model and workload."""


def incomparable(report: Json) -> str:
    """Why a workload's report cannot be held against the figures; empty if it can."""
    device = _in(report, "model.device")
    if not isinstance(device, str) or DEVICE not in device:
        return f"the figures are of an {DEVICE}, this ran on {device or 'an unknown device'}"
    if num_cached := _num_cached(report):
        return f"{num_cached} prompt tokens came from the prefix cache, which the figures' had off"
    return ""


def compare(model: str, workload: str, report: Json) -> Iterator[Comparison]:
    """Every figure of a workload that the report has a number for; none if it is incomparable."""
    if incomparable(report):
        return
    for figure in FIGURES.get(model, {}).get(workload, []):
        ours = _at(report, figure.path)
        if ours is not None:
            yield Comparison(
                model,
                workload,
                figure.path.removeprefix("load.").removeprefix("steps."),
                ours,
                figure.value,
                figure.speed(ours),
                figure.min_share,
            )


def targets(comparisons: list[Comparison]) -> list[Target]:
    """Of the comparisons that have one."""
    return [
        Target(f"{c.model} {c.workload} {c.what}, speed / vLLM's", c.speed, ">=", c.min_speed, "x")
        for c in comparisons
        if c.min_speed is not None
    ]


def _num_cached(report: Json) -> int:
    """Of the load and, for L(B), of the prompts before it."""
    counts = [_in(report, f"{part}.num_cached_tokens") for part in ("load", "prefill")]
    return sum(count for count in counts if isinstance(count, int))


def _at(report: Json, path: str) -> float | None:
    value = _in(report, path)
    return float(value) if isinstance(value, int | float) else None


def _in(report: Json, path: str) -> Any:
    """What stands at a path like "load.requests_per_s"; None if nothing does."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value

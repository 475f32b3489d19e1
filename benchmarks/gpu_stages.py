"""What a measuring session on a GPU runs, in order, and about how long each load takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.dummy_models import SHAPES
from blockyard.bench.workload import WorkloadSpec

STAGES: Final = ("ceilings", *SHAPES, "restart", "swap", "hf")
"""A model's name: its loads on one server. restart: how soon the first model is ready with a warm
kernel cache. swap: twice as many requests as memory, once for each way to preempt. hf: transformers
on the first model."""

HF_SECONDS: Final = 90.0


class UnknownNameError(Exception):
    """No stage or load of that name."""


@dataclass(frozen=True, slots=True)
class Load:
    """One workload on a model. `seconds` is about what it takes."""

    name: str
    spec: WorkloadSpec
    seconds: float


OVERSUBSCRIBED: Final = Load("W2 of 160", WorkloadSpec("W2", num_requests=160), 30)
"""640 tokens each, 12.5 GiB of llama-8b's KV in all."""
SMALL_POOLS: Final = {"kv_memory": "6400MiB", "host_memory": "8GiB"}
"""Half of that, and room for what gives way."""


def _steps(batches: Sequence[int], ms_per_step: float) -> list[Load]:
    """L at several batches, from the time of a step at batch 1."""
    return [
        Load(f"L({batch})", WorkloadSpec("L", batch=batch), 8 + 0.256 * ms_per_step + batch * 0.06)
        for batch in batches
    ]


def loads_of(model: str, trace_path: Path | None) -> list[Load]:
    """The loads of a model, each with prompts of its own."""
    w1 = WorkloadSpec("W1", trace_path)
    if model != "llama-8b":
        loads = [*_steps([1], 3), Load("W1", w1, 25)]
    else:
        loads = [
            *_steps([1, 8, 32, 64, 128, 256], 10),
            Load("W2", WorkloadSpec("W2"), 55),
            Load("W1", w1, 75),
            Load("N4", WorkloadSpec("N4"), 25),
            *(
                Load(f"A({rate})", WorkloadSpec("A", trace_path, rate=float(rate)), 50)
                for rate in (4, 8, 12, 16)
            ),
            Load("W1 sampled", replace(w1, temperature=1.0, top_p=0.95), 80),
        ]
    return [replace(load, spec=replace(load.spec, seed=seed)) for seed, load in enumerate(loads, 1)]


def chosen(names: str | None, known: Sequence[str], kind: str) -> list[str]:
    """The names of a comma-separated list, in the order of `known`; None: all.

    Raises UnknownNameError.
    """
    if names is None:
        return list(known)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := sorted(wanted - set(known)):
        raise UnknownNameError(f"unknown {kind} {unknown[0]!r}; known are {', '.join(known)}")
    return [name for name in known if name in wanted]

"""Settings of an executor process: flags first, then environment, then defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from blockyard.common.link_security import LinkSettings
from blockyard.common.settings import settings_config
from blockyard.common.sizes import parse_size


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


ByteSize = Annotated[int, BeforeValidator(_size)]
"""Bytes; also reads 512MiB, 1.5GB, ..."""


class ExecutorSettings(LinkSettings):
    """One frozen object; nothing else in an executor reads the environment."""

    model_config = settings_config("executor", "executor_svc")

    listen: str = Field(description="Address to serve on: unix:/path or host:port.")
    model_dir: Path = Field(description="The model directory, as `blockyard models import` makes.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; auto: on a GPU if there is one."
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights, for benchmarks on a GPU."
    )
    dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="Of weights and KV on a GPU; the CPU computes in float32."
    )
    gpu_memory_utilization: float = Field(
        0.97, gt=0, le=1, description="Share of the GPU's memory that this process may take."
    )
    kv_memory: Annotated[ByteSize | None, Field(gt=0)] = Field(
        None,
        description="Memory of the device block pool, e.g. 1GiB; not set: 1GiB on the CPU, on a "
        "GPU what gpu_memory_utilization leaves.",
    )
    host_memory: ByteSize = Field(
        0, ge=0, description="Memory of the host block pool, for swapping; 0: none."
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per KV block.")
    max_rows: int | None = Field(
        None, ge=1, description="Most requests resident at once; not set: 64, on a GPU 512."
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens in a step; not set: 64 to 256 by the CPU's speed, on a GPU 8192.",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output; not set: the model's."
    )
    drain_grace_s: float = Field(
        0.0, ge=0, description="After SIGTERM, how long to go on for a scheduler that stays [s]."
    )
    num_threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Threads that compute; not set: one per available CPU.",
    )

    @model_validator(mode="after")
    def _is_closed_to_others(self) -> Self:
        self.check_internal(self.listen)
        return self

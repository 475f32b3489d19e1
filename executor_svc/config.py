"""Settings of an executor process: flags first, then environment, then defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from blockyard.common.sizes import parse_size


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


ByteSize = Annotated[int, BeforeValidator(_size)]
"""Bytes; also reads 512MiB, 1.5GB, ..."""


class ExecutorSettings(BaseSettings):
    """One frozen object, validated once. Environment: BLOCKYARD_EXECUTOR_<FIELD>."""

    model_config = SettingsConfigDict(
        env_prefix="BLOCKYARD_EXECUTOR_",
        frozen=True,
        extra="forbid",
        cli_prog_name="python -m executor_svc",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    listen: str = Field(description="Address to serve on: unix:/path or host:port.")
    model_dir: Path = Field(description="The model directory, as `blockyard models import` makes.")
    kv_memory: ByteSize = Field(
        1 << 30, gt=0, description="Memory of the device block pool, e.g. 1GiB."
    )
    host_memory: ByteSize = Field(
        0, ge=0, description="Memory of the host block pool, for swapping; 0: none."
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per KV block.")
    max_rows: int = Field(256, ge=1, description="Most requests resident at once.")
    max_num_batched_tokens: int = Field(128, ge=1, description="Most tokens in one step.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output; not set: the model's."
    )
    num_threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Threads that compute; not set: one per available CPU.",
    )
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    exit_with_parent: bool = Field(
        False, description="Die with the process that started this one (Linux)."
    )


def load_settings(arguments: Sequence[str]) -> ExecutorSettings:
    """Read flags and environment. Exits with a usage message; raises pydantic.ValidationError."""
    return CliApp.run(ExecutorSettings, cli_args=list(arguments))

"""Settings of the engine: flags, environment (BLOCKYARD_ENGINE_*) and defaults, checked once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from blockyard.common.protocol import MAX_WINDOW


class EngineSettings(BaseSettings):
    """One frozen object; nothing else in the engine reads the environment."""

    model_config = SettingsConfigDict(
        env_prefix="BLOCKYARD_ENGINE_",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_prog_name="python -m scheduler_svc.engine",
    )

    listen: str = Field(description="where front ends connect: unix:/path or host:port")
    executor: str = Field(description="the executor's address: unix:/path or host:port")
    model_digest: str = Field("", description="refuse an executor with another model; empty: any")
    max_num_seqs: int = Field(64, ge=1, description="most requests running at once")
    max_num_batched_tokens: int = Field(
        0, ge=0, description="most tokens in one step; 0: what the executor allows"
    )
    max_model_len: int = Field(0, ge=0, description="longest prompt + output; 0: the model's")
    max_waiting: int = Field(10_000, ge=1, description="most requests queued; more are refused")
    watermark: float = Field(
        0.01, ge=0, lt=1, description="part of the pool that admissions leave free"
    )
    window: int = Field(2, ge=1, le=MAX_WINDOW, description="most plans in flight")
    heartbeat_timeout_s: float = Field(4.0, gt=1, description="silence that means a lost executor")
    progress_timeout_s: float = Field(60.0, gt=0, description="longest step before it counts lost")
    strict: bool = Field(False, description="end the process when a plan is rejected (tests)")
    exit_with_parent: bool = Field(False, description="end when the process that started it ends")
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"

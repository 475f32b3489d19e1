"""Settings of an engine process: flags first, then environment, then defaults."""

from __future__ import annotations

from pydantic import Field

from blockyard.common.protocol import MAX_WINDOW
from blockyard.common.settings import ServiceSettings, settings_config


class EngineSettings(ServiceSettings):
    """One frozen object; nothing else in the engine reads the environment."""

    model_config = settings_config("engine", "scheduler_svc.engine")

    listen: str = Field(description="Where front ends connect: unix:/path or host:port.")
    executor: str = Field(description="The executor's address: unix:/path or host:port.")
    model_digest: str = Field("", description="Refuse an executor with another model; empty: any.")
    max_num_seqs: int = Field(64, ge=1, description="Most requests running at once.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Most tokens in one step; not set: what the executor allows."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output; not set: the model's."
    )
    max_waiting: int = Field(10_000, ge=1, description="Most requests queued; more are refused.")
    watermark: float = Field(
        0.01, ge=0, lt=1, description="Part of the pool that admissions leave free."
    )
    window: int = Field(2, ge=1, le=MAX_WINDOW, description="Most plans in flight.")
    heartbeat_timeout_s: float = Field(
        4.0, gt=1, description="Silence after which the executor counts as lost [s]."
    )
    progress_timeout_s: float = Field(
        60.0, gt=0, description="Longest step before the executor counts as lost [s]."
    )
    strict: bool = Field(False, description="End the process when a plan is rejected (tests).")

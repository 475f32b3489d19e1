"""Settings of an engine process: flags first, then environment, then defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from blockyard.common.link_security import LinkSettings
from blockyard.common.listen_address import host_port_or_off
from blockyard.common.protocol import MAX_WINDOW
from blockyard.common.settings import settings_config
from scheduler_svc.plan_log import MAX_FILE_BYTES
from scheduler_svc.policy import PreemptionMode
from scheduler_svc.telemetry.settings import TracingSettings


class EngineSettings(TracingSettings, LinkSettings):
    """One frozen object; nothing else in the engine reads the environment."""

    model_config = settings_config("engine", "scheduler_svc.engine")

    listen: str = Field(description="Where front ends connect: unix:/path or host:port.")
    executor: str = Field(description="The executor's address: unix:/path or host:port.")
    executor_name: str = Field(
        "",
        description="DNS name or IP address that the executor's certificate must be for; empty: "
        "the host of its address.",
    )
    metrics_address: Annotated[str, AfterValidator(host_port_or_off)] = Field(
        "", description="host:port that answers GET /metrics; empty: none does."
    )
    model_digest: str = Field("", description="Refuse an executor with another model; empty: any.")
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Most branches running at once: requests, their samples and beams; not set: "
        "what the executor holds.",
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Most tokens in one step; not set: what the executor allows."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output; not set: the model's."
    )
    model_dir: Path | None = Field(
        None, description="The model directory; only beam search with stop strings needs it."
    )
    prefix_cache: bool = Field(True, description="Keep KV blocks for requests that begin alike.")
    preemption: PreemptionMode = Field(
        PreemptionMode.AUTO,
        description="What becomes of a victim's KV: auto (the cheaper), recompute, or swap.",
    )
    plan_log: Path | None = Field(
        None, description="Log plans and results to this file, for `blockyard replay`."
    )
    plan_log_max_bytes: int = Field(
        MAX_FILE_BYTES, ge=1 << 20, description="A larger plan log goes on in another file."
    )
    max_waiting: int = Field(10_000, ge=1, description="Most requests queued; more are refused.")
    max_waiting_tokens: int = Field(
        4_000_000,
        ge=1,
        description="Most prompt tokens queued; more are refused, but one request is always taken.",
    )
    watermark: float = Field(
        0.01, ge=0, lt=1, description="Part of the pool that admissions leave free."
    )
    window: int = Field(2, ge=1, le=MAX_WINDOW, description="Most plans in flight.")
    heartbeat_timeout_s: float = Field(
        4.0, gt=1, description="Silence after which the executor counts as lost [s]."
    )
    progress_timeout_s: float = Field(
        60.0,
        gt=0,
        description="The watchdog's period, longer than any step: if none ends for so long, the "
        "executor counts as lost [s].",
    )
    drain_grace_s: float = Field(
        0.0,
        ge=0,
        description="After SIGTERM, how long to go on for front ends that have not left [s].",
    )
    strict: bool = Field(False, description="End the process when a plan is rejected (tests).")

    @model_validator(mode="after")
    def _is_closed_to_others(self) -> Self:
        self.check_internal(self.listen, self.executor)
        return self

"""Settings of a local server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from blockyard.common.listen_address import host_port_or_off, split_host_port
from blockyard.common.otlp_endpoint import endpoint_or_off
from blockyard.common.protocol import MAX_WINDOW
from blockyard.common.sizes import parse_size
from blockyard.models.store import DEFAULT_MODEL


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


def _checked_address(text: str) -> str:
    split_host_port(text)
    return text


class ServeSettings(BaseModel):
    """What `blockyard serve` can be told. None: the service's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEFAULT_MODEL
    """A stored name, a model directory, or a .gguf file; see `store.resolve`."""
    listen: Annotated[str, AfterValidator(_checked_address)] = "127.0.0.1:50051"
    """host:port of the public API; port 0 picks a free one."""
    metrics_address: Annotated[str, AfterValidator(host_port_or_off)] = ""
    """host:port where the engine answers GET /metrics; empty: nowhere."""
    max_model_len: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the executor computes; auto: a GPU if there is one that it can use."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights instead of the model's, for benchmarks; no weight file is read."""
    kv_memory: Annotated[str, AfterValidator(_checked_size)] | None = None
    """Of the executor's block pool, e.g. 512MiB."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory for weights, steps and, if `kv_memory` is None, the block pool."""
    host_memory: Annotated[str, AfterValidator(_checked_size)] | None = None
    """Of the executor's host pool, which preempted requests and evicted blocks go to."""
    preemption: Literal["auto", "recompute", "swap"] | None = None
    prefix_cache: bool = True
    plan_log: Path | None = None
    """The engine logs plans and results here, for `blockyard replay`."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1)
    window: int = Field(default=2, ge=1, le=MAX_WINDOW)
    num_threads: int | None = Field(default=None, ge=1)
    frontends: int = Field(default=1, ge=1, le=64)
    tls_cert: Path | None = None
    """Front ends serve TLS with this certificate; see docs/security.md for these."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    auth_tokens: Path | None = None
    max_client_streams: int | None = Field(default=None, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    log_contents: bool = False
    """Log the messages of unexpected exceptions, which may quote prompts."""
    lame_duck_s: float = Field(default=0.0, ge=0)
    """How long front ends that were told to end serve on while health says NOT_SERVING [s]."""
    drain_grace_s: float = Field(default=30.0, ge=0)
    """How long their open streams may take to finish after that [s]."""
    max_connection_age_s: float | None = Field(default=None, gt=0)
    """Front ends ask clients to reconnect after about so long [s]."""
    otlp_endpoint: Annotated[str, AfterValidator(endpoint_or_off)] = ""
    """Engine and front ends send traces to this OTLP/gRPC collector; empty: nowhere."""
    trace_sample_ratio: float | None = Field(default=None, ge=0, le=1)
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

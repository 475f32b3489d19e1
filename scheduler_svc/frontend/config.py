"""Settings of a front-end process: flags first, then environment, then defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from blockyard.common.link_security import LinkSettings
from blockyard.common.settings import settings_config
from scheduler_svc.frontend.flush_policy import MAX_INTERVAL_S
from scheduler_svc.telemetry.settings import TracingSettings


class FrontendSettings(TracingSettings, LinkSettings):
    """One frozen object; nothing else in a front end reads the environment."""

    model_config = settings_config("frontend", "scheduler_svc.frontend")

    engine: str = Field(description="The engine's gRPC address, e.g. unix:/run/engine.sock.")
    engine_name: str = Field(
        "",
        description="DNS name or IP address that the engine's certificate must be for; empty: the "
        "host of its address.",
    )
    listen: str = Field("127.0.0.1:50051", description="Address to serve on; port 0 picks one.")
    model_dir: Path = Field(description="The model directory; the engine must serve the same.")
    tls_cert: Path | None = Field(
        None, description="Serve TLS with this certificate, or chain of them (PEM)."
    )
    tls_key: Path | None = Field(None, description="Its key (PEM).")
    tls_client_ca: Path | None = Field(
        None, description="Authorities (PEM) of which clients must show a certificate."
    )
    auth_tokens: Path | None = Field(
        None, description="Clients must send one of the bearer tokens in this file."
    )
    max_client_streams: int | None = Field(
        None, ge=1, description="Calls that one client may have open; not set: any number."
    )
    max_request_bytes: int = Field(
        4 << 20, ge=1024, description="Larger requests get RESOURCE_EXHAUSTED."
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longer prompts get RESOURCE_EXHAUSTED; not set: what fits."
    )
    max_buffered_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens of one choice that may wait for its reader; more fail that stream.",
    )
    slow_reader_timeout_s: float = Field(
        30.0,
        gt=0,
        description="How long a client may take none of its output before its stream fails [s].",
    )
    max_merge_ms: float = Field(
        1e3 * MAX_INTERVAL_S,
        ge=0,
        description="Longest that tokens are merged under load [ms]; 0: each is sent at once.",
    )
    lame_duck_s: float = Field(
        5.0,
        ge=0,
        description="After SIGTERM, how long to serve on while health says NOT_SERVING [s].",
    )
    drain_grace_s: float = Field(
        30.0, ge=0, description="After that, how long open streams may take to finish [s]."
    )
    keepalive_s: float = Field(
        30.0, ge=1, description="Ping clients that were silent for so long [s]."
    )
    keepalive_timeout_s: float = Field(
        20.0, gt=0, description="A client that does not answer a ping in time is gone [s]."
    )
    max_connection_age_s: float | None = Field(
        None,
        gt=0,
        description="Ask clients to reconnect after about so long; open streams go on [s].",
    )
    reuse_port: bool = Field(False, description="Several front ends share the port.")

    @model_validator(mode="after")
    def _check_security(self) -> Self:
        self.check_internal(self.engine)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        return self

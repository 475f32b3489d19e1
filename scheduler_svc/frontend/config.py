"""Settings of a front-end process: flags first, then environment, then defaults."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockyard.common.settings import settings_config
from scheduler_svc.telemetry.settings import TracingSettings


class FrontendSettings(TracingSettings):
    """One frozen object; nothing else in a front end reads the environment."""

    model_config = settings_config("frontend", "scheduler_svc.frontend")

    engine: str = Field(description="The engine's gRPC address, e.g. unix:/run/engine.sock.")
    listen: str = Field("127.0.0.1:50051", description="Address to serve on; port 0 picks one.")
    model_dir: Path = Field(description="The model directory; the engine must serve the same.")
    max_request_bytes: int = Field(
        4 << 20, ge=1024, description="Larger requests get RESOURCE_EXHAUSTED."
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
    drain_grace_s: float = Field(
        30.0, ge=0, description="After SIGTERM, how long open streams may take to finish [s]."
    )
    reuse_port: bool = Field(False, description="Several front ends share the port.")

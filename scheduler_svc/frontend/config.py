"""Settings of a front-end process: flags first, then environment, then defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

ENVIRONMENT_PREFIX = "BLOCKYARD_FRONTEND_"


class FrontendSettings(BaseSettings):
    """One frozen object, validated once. Environment: BLOCKYARD_FRONTEND_<FIELD>."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        frozen=True,
        extra="forbid",
        cli_prog_name="python -m scheduler_svc.frontend",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    engine: str = Field(description="The engine's gRPC address, e.g. unix:/run/engine.sock.")
    listen: str = Field("127.0.0.1:50051", description="Address to serve on; port 0 picks one.")
    model_dir: Path = Field(description="The model directory; the engine must serve the same.")
    max_request_bytes: int = Field(
        4 << 20, ge=1024, description="Larger requests get RESOURCE_EXHAUSTED."
    )
    max_buffered_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens of one stream that may wait for its reader; more fail that stream.",
    )
    drain_grace_s: float = Field(
        30.0, ge=0, description="After SIGTERM, how long open streams may take to finish [s]."
    )
    reuse_port: bool = Field(False, description="Several front ends share the port.")
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    exit_with_parent: bool = Field(
        False, description="Die with the process that started this one (Linux)."
    )


def load_settings(arguments: Sequence[str]) -> FrontendSettings:
    """Read flags and environment. Exits with a usage message; raises pydantic.ValidationError."""
    return CliApp.run(FrontendSettings, cli_args=list(arguments))

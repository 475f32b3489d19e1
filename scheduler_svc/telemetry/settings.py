"""The settings of tracing, the same for engine and front ends."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from blockyard.common.otlp_endpoint import endpoint_or_off
from blockyard.common.settings import ServiceSettings


class TracingSettings(ServiceSettings):
    """What a service that is traced has."""

    otlp_endpoint: Annotated[str, AfterValidator(endpoint_or_off)] = Field(
        "",
        description="Send traces and the GenAI metrics to this OTLP/gRPC collector: host:port, "
        "http(s)://host:port or unix:/path; empty: nothing is traced.",
    )
    trace_sample_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of requests that is traced if the client does not say, and of steps.",
    )

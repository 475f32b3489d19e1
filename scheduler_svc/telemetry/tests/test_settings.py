from __future__ import annotations

import pytest

from blockyard.common.otlp_endpoint import endpoint_or_off
from scheduler_svc.frontend.config import FrontendSettings

REQUIRED = ["--engine", "unix:/e", "--model-dir", "/m"]


@pytest.mark.parametrize(
    "endpoint", ["", "127.0.0.1:4317", "http://collector:4317/", "https://[::1]:4317", "unix:/c"]
)
def test_addresses_of_collectors(endpoint: str) -> None:
    settings = FrontendSettings.parse([*REQUIRED, "--otlp-endpoint", endpoint])
    assert settings.otlp_endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["collector", "http://", ":4317", "a:port"])
def test_what_is_no_address(endpoint: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        endpoint_or_off(endpoint)


def test_off_by_default_and_one_in_a_hundred_if_not() -> None:
    settings = FrontendSettings.parse(REQUIRED)
    assert (settings.otlp_endpoint, settings.trace_sample_ratio) == ("", 0.01)

"""Addresses of OTLP/gRPC collectors: `host:port`, `http(s)://host:port` or `unix:/path`."""

from __future__ import annotations

import re
from typing import Final

from blockyard.common.listen_address import split_host_port

_SCHEME: Final = re.compile(r"https?://")


def endpoint_or_off(endpoint: str) -> str:
    """Validate a setting that is a collector's address, or empty for off. Raises ValueError."""
    if endpoint and not endpoint.startswith("unix:"):
        split_host_port(_SCHEME.sub("", endpoint, count=1).rstrip("/"))
    return endpoint

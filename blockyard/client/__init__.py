"""The Python client of the public API, blocking and asynchronous."""

from __future__ import annotations

from blockyard.client.aio import AsyncClient
from blockyard.client.errors import BlockyardError
from blockyard.client.messages import (
    Chunk,
    Completion,
    GenerateOptions,
    Message,
    ModelInfo,
    Usage,
)
from blockyard.client.sync import Client

__all__ = [
    "AsyncClient",
    "BlockyardError",
    "Chunk",
    "Client",
    "Completion",
    "GenerateOptions",
    "Message",
    "ModelInfo",
    "Usage",
]

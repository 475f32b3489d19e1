"""The Python client of the public API, blocking and asynchronous."""

from __future__ import annotations

from blockyard.client.aio import AsyncClient
from blockyard.client.endpoint import Endpoint
from blockyard.client.errors import BlockyardError
from blockyard.client.request import BeamSearch, GenerateOptions, Message
from blockyard.client.response import Choice, Chunk, Completion, ModelInfo, TokenLogprob, Usage
from blockyard.client.sync import Client
from blockyard.common.tls import Tls

__all__ = [
    "AsyncClient",
    "BeamSearch",
    "BlockyardError",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Endpoint",
    "GenerateOptions",
    "Message",
    "ModelInfo",
    "Tls",
    "TokenLogprob",
    "Usage",
]

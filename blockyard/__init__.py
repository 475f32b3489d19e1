"""Blockyard: what users touch (client, command line, local launcher)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockyard.client import AsyncClient, BlockyardError, Client

__all__ = ["AsyncClient", "BlockyardError", "Client"]


def __getattr__(name: str) -> Any:
    """Import the client on first use: the services import this package and need no client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blockyard import client

    return getattr(client, name)

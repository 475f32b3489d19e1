"""Where requests go, and how the connection is secured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blockyard.client.aio import AsyncClient
from blockyard.client.sync import Client
from blockyard.common.tls import Tls


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What clients of one server share; can be sent to other processes."""

    address: str
    """host:port, or unix:/path."""
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    allow_insecure_token: bool = False
    """Send the token without TLS to another machine, too."""

    def client(self, timeout: float | None) -> Client:
        """A blocking client; `timeout` of each request [s]. Raises BlockyardError."""
        return Client(self.address, timeout=timeout, **self._access())

    def async_client(self, timeout: float | None) -> AsyncClient:
        """The same, asynchronous."""
        return AsyncClient(self.address, timeout=timeout, **self._access())

    def _access(self) -> dict[str, Any]:
        return {
            "tls": self.tls,
            "token": self.token,
            "allow_insecure_token": self.allow_insecure_token,
        }

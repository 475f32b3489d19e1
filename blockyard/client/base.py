"""What the two clients have in common beside the messages."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from blockyard.client.errors import BlockyardError
from blockyard.client.tracing import Metadata, traced_call
from blockyard.common.grpc_options import keepalive
from blockyard.common.reloading import FileError
from blockyard.common.tls import Tls

_LOOPBACK = ("127.", "localhost:", "[::1]:")
_THIS_MACHINE = (*_LOOPBACK, "unix:", "unix-abstract:")

_TOKEN = re.compile(r"[!-~]+")

Options = list[tuple[str, str | int]]

# A refusal before the first byte of an answer is tried again elsewhere, or later. CANCELLED is what
# the gRPC library answers a call that arrives while its server closes.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "blockyard.v1.GenerateService"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ]
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a client secures its connection, and what it shows to be let in."""

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    allow_insecure_token: bool = False

    def check(self, address: str) -> None:
        """Refuse a token that cannot be sent, or only in the clear. Raises BlockyardError."""
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise BlockyardError("INVALID_ARGUMENT", "the token is not one, or more than one word")
        is_secret = self.tls is not None or address.startswith(_THIS_MACHINE)
        if self.token is not None and not is_secret and not self.allow_insecure_token:
            raise BlockyardError(
                "INVALID_ARGUMENT",
                f"the token would go to {address} unencrypted; use TLS, or allow_insecure_token "
                "if something on the way encrypts",
            )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: a plain connection. Raises BlockyardError if a file cannot be used."""
        if self.tls is None:
            return None
        try:
            return self.tls.channel_credentials()
        except FileError as error:
            raise BlockyardError("INVALID_ARGUMENT", str(error)) from error


def channel_options(address: str, tls: Tls | None) -> Options:
    """Answers of any size; and no $http_proxy on the way to a server on this machine."""
    options: Options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.service_config", _SERVICE_CONFIG),
        # A server whose machine is gone is noticed while a call waits for it.
        *keepalive(30.0, 20.0),
    ]
    if address.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))
    return options if tls is None else [*options, *tls.channel_options()]


class ClientBase:
    """Whom a client calls, and its own timeout."""

    def __init__(self, address: str, timeout: float | None, access: Access) -> None:
        """`timeout` holds for each call that gives none [s]; None: no limit."""
        access.check(address)
        self._address = address
        self._timeout = timeout
        self._access = access

    @contextlib.contextmanager
    def _calling(self, method: str) -> Iterator[Metadata]:
        """Trace one call of `method`; yields its metadata."""
        token = self._access.token
        with traced_call(method, self._address) as context:
            yield context if token is None else (*context, ("authorization", f"Bearer {token}"))

    def _limit(self, timeout: float | None) -> float | None:
        """The timeout of a call that was given this one [s]."""
        return self._timeout if timeout is None else timeout

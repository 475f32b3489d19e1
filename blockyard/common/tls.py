"""TLS for servers and channels, from files that may be replaced at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from blockyard.common.reloading import FileError, Reloading


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files of a server: its certificates and key, and the authorities that vouch for clients."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """None: clients need no certificate."""


def server_credentials(files: ServerTls) -> grpc.ServerCredentials:
    """Credentials that look at the files before each handshake, for one port. Raises FileError.

    Connections that are open keep what they began with.
    """
    paths = [path for path in (files.cert, files.key, files.client_ca) if path is not None]
    source = Reloading(paths, lambda: _configuration(files))
    current = source.get()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        newest = source.get()
        if newest is current:
            return None
        current = newest
        return newest

    fetch: Any = newer  # may return None, whatever the stubs say
    return grpc.dynamic_ssl_server_credentials(
        current, fetch, require_client_authentication=files.client_ca is not None
    )


def _configuration(files: ServerTls) -> grpc.ServerCertificateConfiguration:
    from blockyard.common.certificates import load_authorities, load_identity

    identity = load_identity(files.cert, files.key)
    authorities = load_authorities(files.client_ca) if files.client_ca is not None else None
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.chain)], root_certificates=authorities
    )


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client secures its connection, and who it says it is. Files are PEM."""

    ca: Path | str | None = None
    """Authorities that vouch for the server; None: those that the gRPC library trusts."""
    cert: Path | str | None = None
    """The client's own certificate, for servers that ask for one."""
    key: Path | str | None = None
    server_name: str = ""
    """DNS name or IP address that the server's certificate must be for; empty: the host of the
    address."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What a channel that is made now connects with. Raises FileError."""
        if (self.cert is None) != (self.key is None):
            raise FileError(f"{self.cert or self.key}: a certificate and its key go together")
        # A client without TLS needs not wait for the library.
        from blockyard.common.certificates import load_authorities, load_identity

        authorities = load_authorities(Path(self.ca)) if self.ca is not None else None
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        identity = load_identity(Path(self.cert), Path(self.key))
        return grpc.ssl_channel_credentials(authorities, identity.key, identity.chain)

    def channel_options(self) -> list[tuple[str, str]]:
        """What a channel with those credentials must be told."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


_NO_CONNECTION: Final = "failed to connect to all addresses"
_VERIFY_FAILED: Final = "CERTIFICATE_VERIFY_FAILED: "
_EXPLAINED: Final[Sequence[tuple[str, str]]] = (
    ("Hostname Verification Check failed", "its certificate is for another name"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("Tls handshake failed", "the TLS handshake failed"),
    ("Socket closed", "it hung up; it may want TLS, or a certificate of the client that it knows"),
)
"""What gRPC's details of a failed connection hold, and what that means to people."""


def handshake_problem(details: str) -> str | None:
    """What is wrong between client and server; None if the details do not speak of TLS."""
    if _NO_CONNECTION not in details:
        return None
    if _VERIFY_FAILED in details:
        reason = details.split(_VERIFY_FAILED, 1)[1].partition(":")[0]
        return f"its certificate is refused: {reason}"
    return next((meaning for text, meaning in _EXPLAINED if text in details), None)

"""Who may talk to whom between the processes of the service.

Unix sockets belong to the user of the processes. TCP takes mutual TLS, and nothing else unless it
is asked for: in a mesh that adds it, or on a machine that nobody else uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import grpc
import grpc.aio
from pydantic import Field, model_validator

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.guards import PeerAllowList
from blockyard.common.listen_address import bind, socket_path
from blockyard.common.reloading import Reloading
from blockyard.common.settings import ServiceSettings
from blockyard.common.tls import ServerTls, Tls, server_credentials


@dataclass(frozen=True, slots=True)
class LinkFiles:
    """Of one process: its certificates and key, and the authorities that vouch for the others."""

    ca: Path
    cert: Path
    key: Path


class LinkSecurity:
    """Makes the servers and channels of the links between the processes of the service."""

    def __init__(self, files: LinkFiles | None = None, allow: tuple[str, ...] = ()) -> None:
        """Read the files. Raises FileError.

        Args:
            files: for mutual TLS over TCP; None: TCP is not encrypted.
            allow: names of which a caller's certificate must have one; empty: any will do.
        """
        self._files = files
        self._allow = allow
        self._channel_credentials: Reloading[grpc.ChannelCredentials] | None = None
        if files is not None:
            tls = Tls(files.ca, files.cert, files.key)
            paths = (files.ca, files.cert, files.key)
            self._channel_credentials = Reloading(paths, tls.channel_credentials)

    def server(self, listen: str) -> grpc.aio.Server:
        """A server for `listen`, which `bind` must be called with."""
        has_names = self._files is not None and socket_path(listen) is None
        guards = [PeerAllowList(self._allow)] if has_names and self._allow else None
        return grpc.aio.server(interceptors=guards, options=LINK_OPTIONS)

    def bind(self, server: grpc.aio.Server, listen: str) -> int:
        """Listen; returns the port. Raises ListenError, FileError."""
        credentials = None
        if self._files is not None and socket_path(listen) is None:
            files = self._files
            credentials = server_credentials(ServerTls(files.cert, files.key, files.ca))
        return bind(server, listen, credentials, is_private=True)

    def channel(self, target: str, name: str = "") -> grpc.aio.Channel:
        """A channel with the newest certificates.

        Args:
            target: gRPC address.
            name: what the other's certificate must be for; empty: the host of the address.
        """
        if self._channel_credentials is None or socket_path(target) is not None:
            return grpc.aio.insecure_channel(target, options=LINK_OPTIONS)
        options = [*LINK_OPTIONS, *Tls(server_name=name).channel_options()]
        return grpc.aio.secure_channel(target, self._channel_credentials.get(), options=options)


PLAIN: Final = LinkSecurity()


class LinkSettings(ServiceSettings):
    """What a process that talks to another one of the service has."""

    admin: str = Field(
        "", description="Address (unix:/path or host:port) of health and channelz for operators."
    )
    internal_ca: Path | None = Field(
        None,
        description="Authorities (PEM) that vouch for the other processes of the service, which "
        "then must have certificates; for internal addresses over TCP.",
    )
    internal_cert: Path | None = Field(
        None, description="This process's certificate (PEM), for both ends of internal links."
    )
    internal_key: Path | None = Field(None, description="Its key (PEM).")
    internal_allow: tuple[str, ...] = Field(
        (),
        description="Who may connect here over TCP: DNS names or SPIFFE ids of certificates; "
        "empty: whoever the authorities vouch for.",
    )
    insecure_internal: bool = Field(
        False,
        description="Internal addresses over TCP without mutual TLS: for a mesh that adds it.",
    )

    @model_validator(mode="after")
    def _check_internal_files(self) -> Self:
        given = [self.internal_ca, self.internal_cert, self.internal_key]
        if any(given) and not all(given):
            raise ValueError("--internal-ca, --internal-cert and --internal-key go together")
        if self.internal_allow and not any(given):
            raise ValueError("--internal-allow needs --internal-ca, -cert and -key")
        return self

    def check_internal(self, *addresses: str) -> None:
        """Raise ValueError if one of them would be open to others."""
        for address in addresses:
            is_closed = socket_path(address) is not None or self.internal_ca is not None
            if not is_closed and not self.insecure_internal:
                raise ValueError(
                    f"{address} is an internal address that others could use: take a unix socket, "
                    "or give --internal-ca, --internal-cert and --internal-key, or, in a mesh "
                    "that encrypts, --insecure-internal"
                )

    def link_security(self) -> LinkSecurity:
        """Read the files. Raises FileError."""
        if self.internal_ca is None or self.internal_cert is None or self.internal_key is None:
            return PLAIN
        files = LinkFiles(self.internal_ca, self.internal_cert, self.internal_key)
        return LinkSecurity(files, self.internal_allow)

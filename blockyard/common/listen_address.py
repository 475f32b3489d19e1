"""Addresses that internal services listen on: `unix:/path` or `host:port`."""

from __future__ import annotations

import pathlib
import socket
import stat
from typing import Final

_MAX_PORT: Final = 65535
_CONNECT_TIMEOUT_S: Final = 1.0


class ListenError(Exception):
    """The address cannot be listened on; the message says why."""


def socket_path(address: str) -> pathlib.Path | None:
    """The file of a unix address, None for others."""
    if not address.startswith("unix:"):
        return None
    return pathlib.Path(address.removeprefix("unix:").removeprefix("//"))


def split_host_port(address: str) -> tuple[str, int]:
    """`host:port` in its parts; an IPv6 host loses its brackets. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def host_port_or_off(address: str) -> str:
    """Validate a setting that is `host:port`, or empty for off. Raises ValueError."""
    if address:
        split_host_port(address)
    return address


def claim(address: str) -> None:
    """Make sure that nobody listens on a unix address, and remove what a dead process left there.

    gRPC would take the socket file of a live server without a word. Does nothing for host:port,
    which the kernel guards. Raises ListenError.
    """
    path = socket_path(address)
    if path is None:
        return
    if not path.parent.is_dir():
        raise ListenError(f"{address}: the directory {path.parent} does not exist")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{address}: {path} exists and is not a socket")
    if is_answered(path):
        raise ListenError(f"{address}: another process is listening there")
    path.unlink(missing_ok=True)


def is_answered(path: pathlib.Path) -> bool:
    """Whether a process listens on the unix socket at `path`; waits for it for a second at most."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True
    return True

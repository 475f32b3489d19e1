"""Addresses that internal services listen on: `unix:/path` or `host:port`."""

from __future__ import annotations

import pathlib
import socket
import stat
from typing import Final

_CONNECT_TIMEOUT_S: Final = 1.0


class ListenError(Exception):
    """The address cannot be listened on; the message says why."""


def socket_path(address: str) -> pathlib.Path | None:
    """The file of a unix address, None for others."""
    if not address.startswith("unix:"):
        return None
    return pathlib.Path(address.removeprefix("unix:").removeprefix("//"))


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
    if _is_answered(path):
        raise ListenError(f"{address}: another process is listening there")
    path.unlink(missing_ok=True)


def _is_answered(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True
    return True

"""Addresses that services listen on: `unix:/path` or `host:port`."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import stat
from collections.abc import Iterator
from typing import Final

import grpc
import grpc.aio

_MAX_PORT: Final = 65535
_CONNECT_TIMEOUT_S: Final = 1.0
_PRIVATE_MASK: Final = 0o177


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


def bind(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
    *,
    is_private: bool,
) -> int:
    """Claim the address and let `server` listen there; returns the port.

    Args:
        server: not started yet.
        address: unix:/path or host:port.
        credentials: of TLS; None: plain.
        is_private: only processes of this user may connect to a unix address, see `claim`.

    Raises ListenError.
    """
    claim(address, is_private=is_private)
    mask = _PRIVATE_MASK if is_private and socket_path(address) is not None else None
    try:
        with _umask(mask):
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ListenError(f"{address}: cannot listen there; is the port in use?") from error


def claim(address: str, *, is_private: bool = True) -> None:
    """Make sure that nobody listens on a unix address, and remove what a dead process left there.

    gRPC would take the socket file of a live server without a word. Does nothing for host:port,
    which the kernel guards.

    Args:
        address: unix:/path or host:port.
        is_private: nobody else may put a socket of theirs in its place. A directory that does not
            exist is made for this user alone.

    Raises ListenError.
    """
    path = socket_path(address)
    if path is None:
        return
    if is_private:
        _check_private(address, path.parent)
    elif not path.parent.is_dir():
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


def _check_private(address: str, directory: pathlib.Path) -> None:
    """Only this user and root may put files into the directory. Raises ListenError."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ListenError(f"{address}: cannot make {directory} ({error.strerror})") from error
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise ListenError(f"{address}: {directory} is not a directory")
    if status.st_uid not in (0, os.getuid()):
        raise ListenError(f"{address}: the directory {directory} belongs to another user")
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_shared and not status.st_mode & stat.S_ISVTX:
        raise ListenError(
            f"{address}: others may write to the directory {directory}; take one of mode 0700"
        )


@contextlib.contextmanager
def _umask(mask: int | None) -> Iterator[None]:
    """Take permissions away from files that are made inside; None: as it is."""
    if mask is None:
        yield
        return
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


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

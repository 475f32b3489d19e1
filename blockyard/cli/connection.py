"""Options of commands that talk to a server: where it is, and how the connection is secured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from blockyard.cli.errors import CommandError
from blockyard.client import BlockyardError, Endpoint, Tls
from blockyard.common.grpc_options import NOBODY_LISTENS

_FILE: Final = click.Path(path_type=Path, dir_okay=False)

_TLS: Final = [
    click.option("--ca", type=_FILE, help="Use TLS, and trust the authorities in this file (PEM)."),
    click.option("--cert", type=_FILE, help="The client's own certificate (PEM)."),
    click.option("--key", type=_FILE, help="Its key (PEM)."),
    click.option(
        "--server-name",
        default="",
        metavar="NAME",
        help="What the server's certificate must be for; default: the host of the address.",
    ),
]

_OPTIONS: Final = [
    click.option(
        "--address", default="127.0.0.1:50051", show_default=True, help="The server's host:port."
    ),
    click.option(
        "--tls", "has_tls", is_flag=True, help="Use TLS, and trust the usual authorities."
    ),
    *_TLS,
    click.option(
        "--token-file",
        type=_FILE,
        envvar="BLOCKYARD_TOKEN_FILE",
        help="Send the bearer token in this file; default: $BLOCKYARD_TOKEN_FILE.",
    ),
    click.option(
        "--insecure-token",
        is_flag=True,
        help="Send it without TLS to another machine, too: a sidecar encrypts.",
    ),
]


class Server(Endpoint):
    """The server that a command talks to."""

    def explain(self, error: BlockyardError) -> Exception:
        """An error as a user should see it: most often there is no server."""
        if error.code == "UNAVAILABLE" and NOBODY_LISTENS in error.message:
            return CommandError(f"no server at {self.address}; start one with: blockyard serve")
        return error


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets a Server as `server`."""

    @functools.wraps(function)
    def command(
        address: str, has_tls: bool, token_file: Path | None, insecure_token: bool, **rest: Any
    ) -> Any:
        tls = taken_tls(rest, is_wanted=has_tls)
        server = Server(address, tls, _read_token(token_file), insecure_token)
        return function(server=server, **rest)

    return _add(_OPTIONS, command)


def tls_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add those of TLS alone; what the command gets is for `taken_tls`."""
    return _add(_TLS, function)


def taken_tls(flags: dict[str, Any], *, is_wanted: bool = False) -> Tls | None:
    """Take the options of TLS out of a command's. Raises click.UsageError."""
    ca, cert, key = (flags.pop(name) for name in ("ca", "cert", "key"))
    server_name = flags.pop("server_name")
    if ca is None and not is_wanted:
        if cert or key or server_name:
            raise click.UsageError("--cert, --key and --server-name go with --ca or --tls")
        return None
    return Tls(ca, cert, key, server_name)


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise CommandError(f"{path}: cannot be read ({reason})", 2) from error
    if not token:
        raise CommandError(f"{path}: holds no token", 2)
    return token


def _add(
    decorators: Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]],
    function: Callable[..., Any],
) -> Callable[..., Any]:
    for decorate in reversed(decorators):
        function = decorate(function)
    return function

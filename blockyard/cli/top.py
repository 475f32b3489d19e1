"""`blockyard top`."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Final

import click
import grpc

from blockyard.cli.connection import taken_tls, tls_options
from blockyard.cli.errors import CommandError
from blockyard.cli.top_frame import Sample, frame
from blockyard.client.errors import BlockyardError, from_rpc
from blockyard.common.grpc_options import LINK_OPTIONS, NOBODY_LISTENS
from blockyard.common.listen_address import socket_path, split_host_port
from blockyard.common.reloading import FileError
from blockyard.common.tls import Tls
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc
from blockyard.launcher.run_dir import running_engines

_ANSWER_TIMEOUT_S: Final = 2.0
_MIN_INTERVAL_S: Final = 0.1
_MAX_INTERVAL_S: Final = 3600.0
_CLEAR: Final = "\x1b[2J"
_HOME: Final = "\x1b[H"
_END_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"


class NoEngineError(CommandError):
    """There is no engine to watch now; there may be one later."""


def _checked_address(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    if address is not None and socket_path(address) is None:
        try:
            split_host_port(address)
        except ValueError as error:
            raise click.BadParameter(f"{error}, nor unix:/path") from error
    return address


def _checked_interval(_: click.Context, __: click.Parameter, interval_s: float) -> float:
    if not _MIN_INTERVAL_S <= interval_s <= _MAX_INTERVAL_S:  # nor is NaN
        raise click.BadParameter(f"{interval_s} is not in {_MIN_INTERVAL_S} to {_MAX_INTERVAL_S}")
    return interval_s


@click.command()
@click.option(
    "--engine",
    "address",
    callback=_checked_address,
    help="The engine's unix:/path or host:port; default: your server on this machine.",
)
@click.option(
    "--interval",
    "interval_s",
    type=float,
    default=1.0,
    show_default=True,
    callback=_checked_interval,
    help="Seconds between two frames.",
)
@click.option("--once", is_flag=True, help="Measure for one interval, print one frame, end.")
@tls_options
def command(address: str | None, interval_s: float, once: bool, **rest: Any) -> None:
    """Watch a running server: rates, queue and memory, until Ctrl-C."""
    with contextlib.closing(EngineWatch(address, taken_tls(rest))) as watch:
        if once:
            _print_once(watch, interval_s)
            return
        with contextlib.suppress(KeyboardInterrupt):
            _print_live(watch, interval_s)


class EngineWatch:
    """Takes samples of one engine: the one at a given address, or the one that runs here."""

    def __init__(self, address: str | None, tls: Tls | None = None) -> None:
        """Nothing is connected yet.

        Args:
            address: unix:/path or host:port; None: look for it, again after it was lost.
            tls: for an engine that takes TCP.
        """
        self._wanted = address
        self._tls = tls
        self._address = ""
        self._channel: grpc.Channel | None = None

    @property
    def title(self) -> str:
        """The first line of a frame."""
        return f"blockyard top  {self._address}"

    def close(self) -> None:
        """Let go of the engine; the next sample connects anew."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def sample(self) -> Sample:
        """Ask for a snapshot. Raises NoEngineError, or another error if asking again is no use."""
        if self._channel is None:
            self._address = self._wanted or _the_running_engine()
            self._channel = self._connect()
        stub = engine_pb2_grpc.EngineServiceStub(self._channel)
        try:
            snapshot = stub.Snapshot(pb.SnapshotRequest(), timeout=_ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            self.close()
            raise _explained(from_rpc(error), self._address) from error
        return Sample(snapshot, time.monotonic())

    def _connect(self) -> grpc.Channel:
        if self._tls is None or socket_path(self._address) is not None:
            return grpc.insecure_channel(self._address, options=LINK_OPTIONS)
        try:
            credentials = self._tls.channel_credentials()
        except FileError as error:
            raise CommandError(str(error), 2) from error
        options = [*LINK_OPTIONS, *self._tls.channel_options()]
        return grpc.secure_channel(self._address, credentials, options=options)


def _the_running_engine() -> str:
    match running_engines():
        case [address]:
            return address
        case []:
            raise NoEngineError("no server runs here; start one with: blockyard serve")
        case addresses:
            choices = "".join(f"\n  --engine {address}" for address in addresses)
            raise NoEngineError(f"several servers run here; choose one:{choices}")


def _explained(error: BlockyardError, address: str) -> Exception:
    """An error as a user should see it; a NoEngineError if it may pass."""
    match error.code:
        case "UNAVAILABLE" if NOBODY_LISTENS in error.message:
            return NoEngineError(f"no engine at {address}")
        case "UNAVAILABLE":
            return NoEngineError(f"no engine at {address}: {error.message}")
        case "DEADLINE_EXCEEDED":
            return NoEngineError(f"the engine at {address} does not answer")
        case "UNIMPLEMENTED":
            return CommandError(f"what listens at {address} is not an engine")
    return error


def _print_once(watch: EngineWatch, interval_s: float) -> None:
    first = watch.sample()
    time.sleep(interval_s)
    click.echo("\n".join(frame(watch.title, watch.sample(), first)))


def _print_live(watch: EngineWatch, interval_s: float) -> None:
    """Draw frames for ever; an engine that goes away is waited for. Raises as `sample` does."""
    sample = watch.sample()  # no engine at the start is an error
    previous: Sample | None = sample
    if sys.stdout.isatty():
        click.echo(_CLEAR, nl=False)
    lines = frame(watch.title, sample, None)
    while True:
        _draw(lines)
        time.sleep(interval_s)
        try:
            sample = watch.sample()
        except NoEngineError as error:
            previous = None
            lines = [watch.title, "", *str(error).splitlines(), "trying again"]
        else:
            lines = frame(watch.title, sample, previous)
            previous = sample


def _draw(lines: list[str]) -> None:
    """Over the last frame on a terminal, below it elsewhere."""
    if sys.stdout.isatty():
        body = "".join(f"{line}{_END_OF_LINE}\n" for line in lines)
        click.echo(f"{_HOME}{body}{_REST_OF_SCREEN}", nl=False)
    else:
        click.echo("\n".join([*lines, ""]))

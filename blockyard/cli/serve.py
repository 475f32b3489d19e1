"""`blockyard serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import Any, Final

import click
import pydantic
import uvloop

from blockyard.cli.errors import CommandError
from blockyard.cli.models import errors_explained
from blockyard.common import logs
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store

_FILE: Final = click.Path(path_type=Path, dir_okay=False, resolve_path=True)

log = logging.getLogger(__name__)


@click.command()
@click.option("--model", default=store.DEFAULT_MODEL, show_default=True, help="Name or path.")
@click.option("--listen", default="127.0.0.1:50051", show_default=True, help="host:port.")
@click.option(
    "--metrics-address",
    default="127.0.0.1:9464",
    show_default=True,
    help="host:port of the Prometheus metrics; an empty one turns them off.",
)
@click.option("--max-model-len", type=int, help="Longest prompt + output; default: the model's.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs; auto: on a GPU if there is one.",
)
@click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy: random weights, for benchmarks.",
)
@click.option(
    "--kv-memory",
    help="Memory for the KV cache; default: 1GiB on a CPU, what is left on a GPU.",
)
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Most of a GPU's memory to use, from 0 to 1; default: the executor's choice.",
)
@click.option("--host-memory", help="Memory to swap KV blocks to; default: none.")
@click.option(
    "--preemption",
    type=click.Choice(["auto", "recompute", "swap"]),
    help="What becomes of the KV of requests that must wait; auto: the cheaper.",
)
@click.option(
    "--prefix-cache/--no-prefix-cache",
    default=True,
    show_default=True,
    help="Share the KV of equal beginnings of prompts.",
)
@click.option(
    "--plan-log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Log all plans and results, prompts included, for `blockyard replay`; grows without end.",
)
@click.option("--max-num-seqs", type=int, help="Most requests running at once.")
@click.option("--max-num-batched-tokens", type=int, help="Most tokens in one step.")
@click.option("--block-size", type=int, default=16, show_default=True, help="Tokens per block.")
@click.option("--window", type=int, default=2, show_default=True, help="Plans in flight, 1 to 3.")
@click.option("--num-threads", type=int, help="Of the executor; default: its own choice.")
@click.option("--frontends", type=int, default=1, show_default=True, help="Front-end processes.")
@click.option(
    "--lame-duck-s",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Seconds that front ends serve on, NOT_SERVING, before they drain.",
)
@click.option(
    "--drain-grace-s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that open streams then have to finish.",
)
@click.option(
    "--max-connection-age-s",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which clients are asked to reconnect; default: never.",
)
@click.option("--tls-cert", type=_FILE, help="Serve TLS with this certificate (PEM).")
@click.option("--tls-key", type=_FILE, help="Its key (PEM).")
@click.option(
    "--tls-client-ca", type=_FILE, help="Clients must have a certificate of these authorities."
)
@click.option("--auth-tokens", type=_FILE, help="Clients must send one of the tokens in this file.")
@click.option("--max-client-streams", type=int, help="Calls that one client may have open.")
@click.option("--max-prompt-tokens", type=int, help="Longer prompts are refused.")
@click.option(
    "--otlp-endpoint",
    default="",
    help="Send traces and GenAI metrics to this OTLP/gRPC collector, e.g. 127.0.0.1:4317.",
)
@click.option(
    "--trace-sample-ratio",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Share of requests and steps that is traced, from 0 to 1; default: 0.01.",
)
@click.option(
    "--log-contents",
    is_flag=True,
    help="Log the messages of unexpected exceptions, which may quote prompts.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option(
    "--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO"
)
def command(**flags: Any) -> None:
    """Serve a model on this machine, until Ctrl-C.

    Starts an executor, an engine and the front ends, and restarts what dies. The first Ctrl-C
    lets open streams finish; a second one does not. SIGUSR2 replaces the front ends one by one.
    """
    try:
        settings = ServeSettings(**flags)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        flag = str(problem["loc"][0]).replace("_", "-")
        message = problem["msg"].removeprefix("Value error, ")
        raise click.BadParameter(message, param_hint=f"--{flag}") from error
    logs.configure(
        "serve", settings.log_format, settings.log_level, has_contents=settings.log_contents
    )
    with errors_explained():
        model_path = store.resolve(settings.model)
    try:
        code = uvloop.run(_serve(settings.model_copy(update={"model": str(model_path)})))
    except ServeError as error:
        raise CommandError(str(error), error.exit_code) from error
    sys.exit(code)


async def _serve(settings: ServeSettings) -> int:
    """Serve until a signal; returns the exit code: 0, or 128 + that of the second signal."""
    server = LocalServer(settings, _json_line if settings.log_format == "json" else _text_line)
    stop = asyncio.Event()
    code = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal code
        if stop.is_set():
            code = 128 + number
            server.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    stopped = asyncio.create_task(stop.wait())
    work = asyncio.create_task(_run(server))
    await asyncio.wait([stopped, work], return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        log.info("stopping; Ctrl-C again kills")
        work.cancel()
        await asyncio.wait([work])
    else:
        stopped.cancel()
        work.result()
    return code


async def _roll(server: LocalServer) -> None:
    logs.event(log, "rolling restart")
    try:
        await server.roll()
    except ServeError as error:
        log.error("rolling restart given up, the old front ends go on: %s", error)
    else:
        logs.event(log, "rolling restart done")


async def _run(server: LocalServer) -> None:
    rolls = set()

    def roll() -> None:
        task = asyncio.create_task(_roll(server))
        rolls.add(task)
        task.add_done_callback(rolls.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, roll)
    settings = server.settings
    access = "--ca ... " if settings.tls_cert is not None else ""
    access += "--token-file ... " if settings.auth_tokens is not None else ""
    async with server:
        logs.event(
            log,
            "ready",
            address=server.address,
            after_s=f"{server.ready_s:.1f}",
            try_it=f"'blockyard generate --address {server.address} {access}\"Hello\"'",
        )
        await server.wait()


def _text_line(name: str, line: str) -> None:
    _json_line(name, f"{name:10} | {line}")


def _json_line(_name: str, line: str) -> None:
    """Children write JSON objects that carry their name."""
    # Whoever read our output may have left: the children must not wait for somebody to read theirs.
    with contextlib.suppress(OSError):
        click.echo(line, file=sys.stderr)

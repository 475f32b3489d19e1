"""`blockyard demo`."""

from __future__ import annotations

import time
from typing import Final

import click
import uvloop

from blockyard.cli.chat import timings
from blockyard.cli.errors import CommandError
from blockyard.cli.models import errors_explained
from blockyard.client import AsyncClient
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store

_QUESTION: Final = "In one short paragraph: why does a computer page its memory?"


@click.command()
@click.argument("question", default=_QUESTION)
@click.option("--model", default=store.DEFAULT_MODEL, show_default=True, help="Name or path.")
@click.option("--keep", is_flag=True, help="Keep serving afterwards, until Ctrl-C.")
def command(question: str, model: str, keep: bool) -> None:
    """Serve the default model on a free port, ask it QUESTION, stream the answer, and stop."""
    begin = time.monotonic()
    with errors_explained():
        path = store.resolve(model)
    settings = ServeSettings(model=str(path), listen="127.0.0.1:0")
    click.echo(
        "starting executor, engine and front end "
        "(the first start compiles the kernels: about 20 s) ...",
        err=True,
    )
    try:
        uvloop.run(_demo(settings, question, begin, keep=keep))
    except ServeError as error:
        raise CommandError(str(error), error.exit_code) from error


async def _demo(settings: ServeSettings, question: str, begin: float, *, keep: bool) -> None:
    async with LocalServer(settings) as server:
        click.echo(f"ready on {server.address} after {server.ready_s:.1f} s", err=True)
        async with AsyncClient(server.address) as client:
            await _ask(client, question, begin)
        if keep:
            click.echo(f"still serving on {server.address}; Ctrl-C stops it", err=True)
            await server.wait()


async def _ask(client: AsyncClient, question: str, begin: float) -> None:
    model = await client.model()
    click.echo(f"\n{model.name}> {question}\n")
    start = first = time.monotonic()
    num_tokens = 0
    if model.has_chat_template:
        chunks = client.generate(messages=[{"role": "user", "content": question}], max_tokens=120)
    else:
        chunks = client.generate(question, max_tokens=120)
    async for chunk in chunks:
        if not num_tokens:
            first = time.monotonic()
        num_tokens += len(chunk.token_ids)
        click.echo(chunk.text, nl=False)
    end = time.monotonic()
    click.echo(f"\n\n{timings(num_tokens, first - start, end - first)}", err=True)
    click.echo(f"first token {first - begin:.1f} s after the command was given", err=True)

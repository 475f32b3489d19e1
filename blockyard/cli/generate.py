"""`blockyard generate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from blockyard.cli import options
from blockyard.cli.batch import Batch, run_batch
from blockyard.cli.errors import CommandError
from blockyard.client import BlockyardError, Client


@click.command()
@click.argument("prompt", required=False)
@options.address
@click.option("--chat/--raw", "is_chat", default=None, help="As a chat message, or plain text.")
@click.option(
    "--file",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="JSON lines, one request each: prompt, messages or token_ids, and sampling fields.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the results of --file go; default: standard output.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Requests of --file in flight.",
)
@options.sampling
def command(prompt: str | None, address: str, source: Path | None, **rest: Any) -> None:
    """Complete PROMPT and stream the text; or every request of a file.

    PROMPT is sent as a chat message if the model has a chat template, unless --raw is given.

    \b
    blockyard generate "Write a haiku about memory." --max-tokens 60
    blockyard generate --raw "Once upon a time" --temperature 0
    blockyard generate --file requests.jsonl --output results.jsonl
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("give either a PROMPT or --file")
    is_chat, output, concurrency = (rest.pop(key) for key in ("is_chat", "output", "concurrency"))
    if source is None and output is not None:
        raise click.UsageError("--output goes with --file")
    if source is not None and output is not None and output.exists() and output.samefile(source):
        raise click.UsageError("--output is the input file")
    try:
        if source is not None:
            batch = Batch(address, source, output, concurrency, is_chat, options.given(rest))
            _report(asyncio.run(run_batch(batch)))
        elif prompt is not None:
            _stream(prompt, address, is_chat, rest)
    except BlockyardError as error:
        raise options.explain(error, address) from error


def _stream(prompt: str, address: str, is_chat: bool | None, given: dict[str, Any]) -> None:
    with Client(address) as client:
        if is_chat is None:
            is_chat = client.model().has_chat_template
        wanted = options.given(given)
        if is_chat:
            chunks = client.generate(messages=[{"role": "user", "content": prompt}], **wanted)
        else:
            chunks = client.generate(prompt, **wanted)
        try:
            for chunk in chunks:
                click.echo(chunk.text, nl=False)
        finally:
            click.echo()


def _report(num_failed: int) -> None:
    if num_failed:
        raise CommandError(f"{num_failed} request(s) failed; see the error fields of the results")

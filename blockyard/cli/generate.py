"""`blockyard generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from blockyard.cli import connection, options
from blockyard.cli.batch import Batch, run_batch
from blockyard.cli.errors import CommandError
from blockyard.cli.options import Target
from blockyard.client import BlockyardError, Client, GenerateOptions, TokenLogprob


@click.command()
@click.argument("prompt", required=False)
@connection.options
@options.timeout
@click.option("--chat/--raw", "is_chat", default=None, help="As a chat message, or plain text.")
@options.system
@click.option(
    "--file",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="JSON lines, one request each: prompt, messages or token_ids, and the client's options.",
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
@options.choices
@options.sampling
def command(prompt: str | None, source: Path | None, **rest: Any) -> None:
    """Complete PROMPT and stream the text; or every request of a file.

    PROMPT is sent as a chat message if the model has a chat template, unless --raw is given.

    \b
    blockyard generate "Write a haiku about memory." --max-tokens 60
    blockyard generate --raw "Once upon a time" --temperature 0
    blockyard generate "Name a colour." -n 4
    blockyard generate --file requests.jsonl --output results.jsonl
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("give either a PROMPT or --file")
    output, concurrency = rest.pop("output"), rest.pop("concurrency")
    if source is None and output is not None:
        raise click.UsageError("--output goes with --file")
    if source is not None and output is not None and output.exists() and output.samefile(source):
        raise click.UsageError("--output is the input file")
    target = Target(*(rest.pop(name) for name in ("server", "timeout", "is_chat", "system")))
    if target.is_chat is False and target.system is not None:
        raise click.UsageError("--system goes with a chat, not with --raw")
    wanted = options.given(rest)
    try:
        if source is not None:
            _report(asyncio.run(run_batch(Batch(target, source, output, concurrency, wanted))))
        elif prompt is not None:
            _complete(prompt, target, wanted)
    except BlockyardError as error:
        raise target.server.explain(error) from error


def _complete(prompt: str, target: Target, wanted: GenerateOptions) -> None:
    with target.server.client(target.timeout) as client:
        request: dict[str, Any] = {**wanted}
        if target.is_chat_for(client.model()):
            request["messages"] = options.conversation(target.system, prompt)
        else:
            request["prompt"] = prompt
        num_choices = wanted.get("num_samples") or wanted.get("beam", {}).get("num_choices") or 1
        if num_choices == 1:
            _stream(client, request)
        else:
            _print_choices(client, request)


def _stream(client: Client, request: dict[str, Any]) -> None:
    """Print the only choice as it comes."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    try:
        for chunk in client.generate(**request):
            click.echo(chunk.text, nl=False)
            token_ids += chunk.token_ids
            logprobs += chunk.logprobs
    finally:
        if token_ids:
            click.echo()
    _print_logprobs(token_ids, logprobs)


def _print_choices(client: Client, request: dict[str, Any]) -> None:
    """Print all choices when they are complete; side by side they would be unreadable."""
    choices = client.complete(**request).choices
    for choice in choices:
        score = f", score {choice.score:.4f}" if "beam" in request else ""
        title = f"choice {choice.index + 1} of {len(choices)}: {choice.finish_reason}{score}"
        click.echo(f"--- {title} ---\n{choice.text}")
        _print_logprobs(choice.token_ids, choice.logprobs)


def _print_logprobs(token_ids: Iterable[int], logprobs: Sequence[TokenLogprob]) -> None:
    """A line for each token: id, log-probability, and the likeliest ids with theirs."""
    if not logprobs:
        return
    click.echo("   token  logprob  likeliest")
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        likeliest = "".join(f"  {other} {logprob:.4f}" for other, logprob in entry.candidates)
        click.echo(f"{token_id:8}  {entry.logprob:7.4f}{likeliest}")


def _report(num_failed: int) -> None:
    if num_failed:
        raise CommandError(f"{num_failed} request(s) failed; see the error fields of the results")

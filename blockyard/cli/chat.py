"""`blockyard chat`."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import click

from blockyard.cli import connection, options
from blockyard.cli.connection import Server
from blockyard.cli.errors import CommandError
from blockyard.client import BlockyardError, Client, GenerateOptions, Message


@click.command()
@connection.options
@options.timeout
@options.system
@options.sampling
def command(server: Server, timeout: float | None, system: str | None, **rest: Any) -> None:
    """Talk to the model: a line at a time, answers stream in.

    /clear forgets the conversation, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    try:
        with server.client(timeout) as client:
            model = client.model()
            if not model.has_chat_template:
                raise CommandError(f"{model.name} has no chat template; use: blockyard generate")
            click.echo(f"{model.name}; /clear, /quit", err=True)
            _Conversation(client, system, options.given(rest)).run()
    except BlockyardError as error:
        raise server.explain(error) from error


class _Conversation:
    def __init__(self, client: Client, system: str | None, wanted: GenerateOptions) -> None:
        self._client = client
        self._options = wanted
        self._opening: list[Message] = []
        if system:
            self._opening.append({"role": "system", "content": system})
        self._messages = list(self._opening)

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while (line := _read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    return
                case "/clear":
                    self._messages = list(self._opening)
                case text if text.startswith("/"):
                    click.echo("commands: /clear, /quit", err=True)
                case text:
                    self._exchange(text)

    def _exchange(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except BlockyardError as error:
            # Without an answer the question is no part of the conversation.
            self._messages.pop()
            click.echo(f"\n{error}", err=True)
        else:
            if answer:
                self._messages.append({"role": "assistant", "content": answer})
            else:
                self._messages.pop()

    def _answer(self) -> str:
        """Stream one answer; Ctrl-C ends it and keeps what came. Returns its text."""
        pieces: list[str] = []
        num_tokens = 0
        start = first = time.monotonic()
        chunks = self._client.generate(messages=self._messages, **self._options)
        try:
            for chunk in chunks:
                if not num_tokens:
                    first = time.monotonic()
                num_tokens += len(chunk.token_ids)
                pieces.append(chunk.text)
                click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        finally:
            chunks.close()
        click.echo()
        click.echo(timings(num_tokens, first - start, time.monotonic() - first), err=True)
        return "".join(pieces)


def timings(num_tokens: int, first_s: float, rest_s: float) -> str:
    """E.g. "[32 tokens, first after 0.15 s, 41.0 tok/s]"."""
    rate = f", {(num_tokens - 1) / rest_s:.1f} tok/s" if num_tokens > 1 and rest_s > 0 else ""
    return f"[{num_tokens} tokens, first after {first_s:.2f} s{rate}]"


def _read_line() -> str | None:
    """The next line, or None at the end of the input. Ctrl-C clears a line that was begun."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                click.echo(err=True)
            return None
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D leaves)", err=True)

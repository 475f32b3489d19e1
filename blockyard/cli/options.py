"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from blockyard.cli.errors import CommandError
from blockyard.client.errors import BlockyardError
from blockyard.client.messages import GenerateOptions

Function = TypeVar("Function", bound=Callable[..., object])

_SAMPLING = [
    click.option("--max-tokens", type=click.IntRange(1), help="Most output tokens."),
    click.option("--temperature", type=click.FloatRange(0), help="0 is greedy."),
    click.option("--top-k", type=click.IntRange(0), help="Keep the K likeliest tokens; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Relative to the likeliest token."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same output."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
]

_NOBODY = "failed to connect to all addresses"
"""gRPC's words when nobody listens."""

address = click.option(
    "--address", default="127.0.0.1:50051", show_default=True, help="The server's host:port."
)


def sampling(function: Function) -> Function:
    """Add the sampling options; the command gets them as `**options`."""
    for option in reversed(_SAMPLING):
        function = option(function)
    return function


def given(options: dict[str, Any]) -> GenerateOptions:
    """The sampling options that the user gave."""
    return cast(
        "GenerateOptions",
        {name: value for name, value in options.items() if value is not None and value != ()},
    )


def explain(error: BlockyardError, address: str) -> Exception:
    """An error as a user should see it: most often there is no server."""
    if error.code == "UNAVAILABLE" and _NOBODY in error.message:
        return CommandError(f"no server at {address}; start one with: blockyard serve")
    return error

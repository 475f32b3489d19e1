"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import click

from blockyard.cli.connection import Server
from blockyard.cli.errors import CommandError
from blockyard.client import GenerateOptions, Message, ModelInfo

Function = TypeVar("Function", bound=Callable[..., object])

MAX_TIMEOUT_S: Final = 1e6
"""gRPC takes deadlines some centuries away for past ones."""

_SAMPLING: Final = [
    click.option("--max-tokens", type=click.IntRange(1), help="Most output tokens."),
    click.option("--temperature", type=click.FloatRange(0), help="0 is greedy."),
    click.option("--top-k", type=click.IntRange(0), help="Keep the K likeliest tokens; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Relative to the likeliest token."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same output."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=click.IntRange(0, 2**32 - 1),
        multiple=True,
        help="End with this token; repeatable.",
    ),
    click.option(
        "--ignore-eos", is_flag=True, default=None, help="Go on past the model's own end tokens."
    ),
    click.option(
        "--cache-salt", metavar="TEXT", help="Share cached KV only with requests of this salt."
    ),
    click.option(
        "--no-cache", "cache_off", is_flag=True, default=None, help="Share cached KV with nobody."
    ),
    click.option(
        "--priority",
        type=click.IntRange(-10, 10),
        help="Class of service: a higher one is served first; default 0.",
    ),
]

_CHOICES: Final = [
    click.option(
        "-n", "--samples", "num_samples", type=click.IntRange(1), help="Independent samples."
    ),
    click.option(
        "--beam-width", type=click.IntRange(1), help="Beam search, keeping so many beams."
    ),
    click.option("--num-choices", type=click.IntRange(1), help="Beams returned; default 1."),
    click.option(
        "--length-penalty",
        type=float,
        help="A beam's score is its log-probability / tokens ** this; default 1.",
    ),
    click.option(
        "--early-stopping",
        type=click.Choice(["heuristic", "at_width", "never"]),
        help="When a beam search ends that has enough ended beams.",
    ),
    click.option(
        "--logprobs",
        type=click.IntRange(0),
        metavar="K",
        help="Show each token's log-probability and those of the K likeliest.",
    ),
]

_BEAM_FIELDS: Final = {
    "beam_width": "width",
    "num_choices": "num_choices",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}

system = click.option("--system", metavar="TEXT", help="A system message that opens the chat.")
timeout = click.option(
    "--timeout",
    type=click.FloatRange(0, MAX_TIMEOUT_S, min_open=True),
    metavar="SECONDS",
    help="Give up on an answer after that.",
)


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and how prompts are sent to it."""

    server: Server
    timeout: float | None  # of each request [s]
    is_chat: bool | None  # None: if the model has a chat template
    system: str | None

    def is_chat_for(self, model: ModelInfo) -> bool:
        """Whether prompts are sent as chat messages. Raises CommandError."""
        if self.is_chat is not None:
            return self.is_chat
        if self.system is not None and not model.has_chat_template:
            raise CommandError(f"{model.name} has no chat template, which --system needs")
        return model.has_chat_template


def sampling(function: Function) -> Function:
    """Add what shapes an output; the command gets it as `**options`, for `given`."""
    return _add(_SAMPLING, function)


def choices(function: Function) -> Function:
    """Add what makes several outputs, or says more of them; likewise."""
    return _add(_CHOICES, function)


def given(options: dict[str, Any]) -> GenerateOptions:
    """The options of a request that the user gave. Raises click.UsageError."""
    found = {name: value for name, value in options.items() if value is not None and value != ()}
    beam = {field: found.pop(name) for name, field in _BEAM_FIELDS.items() if name in found}
    if beam:
        if "width" not in beam:
            (first, *_) = beam
            raise click.UsageError(f"--{first.replace('_', '-')} goes with --beam-width")
        found["beam"] = beam
    return cast("GenerateOptions", found)


def conversation(system_message: str | None, prompt: str) -> list[Message]:
    """A chat of one user message, after a system message if there is one."""
    opening: list[Message] = []
    if system_message is not None:
        opening.append({"role": "system", "content": system_message})
    return [*opening, {"role": "user", "content": prompt}]


def _add(options: Sequence[Callable[[Function], Function]], function: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function

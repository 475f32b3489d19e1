"""Entry point of the `blockyard` command. Subcommands are imported when they are called."""

from __future__ import annotations

import importlib
import os
from typing import Final

import click

from blockyard.cli.errors import CommandError
from blockyard.client.errors import BlockyardError

_STDOUT: Final = 1

_COMMANDS: Final = {
    "bench": "Measure a running server with a workload.",
    "chat": "Talk to the model of a running server.",
    "demo": "Serve the default model, ask it one question, and stop.",
    "generate": "Complete a prompt, or a file of them.",
    "models": "Import models and list them.",
    "replay": "Do again what a plan log says, and tell the first difference.",
    "serve": "Serve a model on this machine.",
    "top": "Watch a running server: rates, queue and memory, live.",
    "simulate": "Replay a trace against the scheduler, on a virtual clock.",
}
"""Name -> summary; the command is the attribute `command` of the module of that name."""


class _LazyGroup(click.Group):
    """Lists commands without importing them, so that `--help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"blockyard.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blockyard")
def cli() -> None:
    """Blockyard serves large language models with PagedAttention.

    \b
    Start a server:       blockyard serve
    Then, elsewhere:      blockyard generate "The capital of France is"
    Or all in one go:     blockyard demo
    """


def main() -> int:
    """Run the command line and return the exit code.

    1: it failed; 2: it was asked for something impossible; 130: it was interrupted.
    """
    try:
        # Returns what the command returned, or the code of `--help` and the like.
        exit_code = cli(prog_name="blockyard", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BlockyardError as error:
        return _fail(error.message if error.code == "INVALID_ARGUMENT" else str(error), 1)
    except CommandError as error:
        return _fail(str(error), error.exit_code)
    except ExceptionGroup as group:  # click itself takes a lone BrokenPipeError
        if group.split(BrokenPipeError)[1] is not None:
            raise
        # Nobody reads the results any more; what is left of them must not be flushed at the end.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), _STDOUT)
        return 1
    return exit_code if isinstance(exit_code, int) else 0


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"blockyard: {message}", err=True)
    return exit_code

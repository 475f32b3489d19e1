"""`blockyard replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from tqdm import tqdm

from blockyard.cli.errors import CommandError
from blockyard.replay.difference import Steps
from blockyard.replay.run import Replay, ReplayError

_POSITIVE: Final = click.IntRange(1)
_PATH: Final = click.Path(path_type=Path)


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--scheduler", is_flag=True, help="Only make the plans again.")
@click.option("--executor", is_flag=True, help="Only run the plans again.")
@click.option("--from", "first", type=_POSITIVE, default=1, help="Compare from this step on.")
@click.option("--to", "last", type=_POSITIVE, help="Stop after this step.")
def command(
    files: tuple[Path, ...], scheduler: bool, executor: bool, first: int, last: int | None
) -> None:
    """Do again what `blockyard serve --plan-log` wrote down, and tell the first difference.

    FILE... are the files of one log, in any order. The scheduler gets the recorded requests and
    results and must make the same plans. The plans go to an executor that checks content; its
    results must be the same if the log was recorded on such a one. Steps are counted from 1 over
    the whole log.

    \b
    Exit code 1: there is a difference. 2: the log cannot be read.
    """
    if last is not None and last < first:
        raise click.BadParameter(f"{last} is before --from {first}", param_hint="--to")
    is_both = scheduler == executor
    try:
        replay = Replay(
            files,
            scheduler=scheduler or is_both,
            executor=executor or is_both,
            steps=Steps(first, last),
        )
    except ReplayError as error:
        raise CommandError(str(error), 2) from error
    if (version := replay.other_version) is not None:
        click.echo(f"recorded by blockyard {version}, which may have planned otherwise", err=True)
    unread = _run(replay)
    for name, half in replay.halves.items():
        difference = replay.differences.get(name)
        click.echo(f"{name}: {half.summary if difference is None else f'differs at {difference}'}")
    if replay.differences:
        raise CommandError("the replay differs from the recording")
    if unread is not None:
        raise CommandError(str(unread), 2) from unread


def _run(replay: Replay) -> ReplayError | None:
    """Run under a progress bar; returns why the log could not be read to its end, if so."""
    with tqdm(total=replay.num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        try:
            replay.run(lambda num_bytes: bar.update(num_bytes - bar.n))
        except ReplayError as error:
            return error
    return None

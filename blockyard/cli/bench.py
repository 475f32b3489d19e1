"""`blockyard bench`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from tqdm import tqdm

from blockyard.bench.client import Progress
from blockyard.bench.load import LoadError, Watch
from blockyard.bench.report import Options, Phase, Report, measure, table
from blockyard.bench.workload import ARRIVALS, WORKLOADS, WorkloadError, WorkloadSpec
from blockyard.cli import connection
from blockyard.cli.connection import Server
from blockyard.cli.errors import CommandError
from blockyard.client import BlockyardError
from blockyard.simulate.trace import TraceError

_POSITIVE: Final = click.IntRange(1)
_POSITIVE_FLOAT: Final = click.FloatRange(0, 1e6, min_open=True)


@click.group()
def command() -> None:
    """Measure a running server."""


@command.command("serve")
@connection.options
@click.option("--workload", "kind", type=click.Choice(tuple(WORKLOADS)), default="W1")
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(path_type=Path),
    help="Azure CSV or Mooncake JSON lines, for W1, A and trace; default: generated requests.",
)
@click.option("--batch", type=_POSITIVE, metavar="B", help="Requests of L.")
@click.option("--rate", type=_POSITIVE_FLOAT, metavar="R", help="Arrivals per second.")
@click.option(
    "--arrivals",
    type=click.Choice(ARRIVALS),
    help="All at once, Poisson, or the trace's own; default: as the workload says.",
)
@click.option("--num-requests", type=_POSITIVE, help="Default: as the workload says.")
@click.option("--temperature", type=click.FloatRange(0, 100), help="Default: 0, of N4 1.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Default: 1.")
@click.option(
    "--clients",
    "num_clients",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Client processes.",
)
@click.option("--seed", type=click.IntRange(0, 2**16), default=0, show_default=True)
@click.option("--vocab-size", type=_POSITIVE, help="Prompts' ids are below; default: the model's.")
@click.option(
    "--warm-up",
    "num_warm_ups",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    help="Short requests before the measurement.",
)
@click.option("--time-limit", "time_limit_s", type=_POSITIVE_FLOAT, metavar="SECONDS")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def serve(server: Server, output: Path | None, **flags: Any) -> None:
    """Replay a workload through the streaming client and print throughput and latencies.

    Prompts are random token ids, outputs have a forced length, no text is made.

    \b
    W1     1,000 conversations of at most 8,192 tokens, all at once
    W2     1,024 requests of 128 prompt and 512 output tokens, all at once
    L      --batch B requests of 1,024 + 257 tokens, then of 1,024 + 1: time per step
    N4     128 prompts of 512 tokens, 4 samples of 256 tokens each, temperature 1
    A      40 s of conversations at --rate R, arriving as the trace says
    trace  all of a trace

    \b
    blockyard bench serve --workload L --batch 8
    blockyard bench serve --workload A --rate 4 --trace azure_conv_2023.csv
    """
    fields = WorkloadSpec.__dataclass_fields__
    spec = WorkloadSpec(**{name: flags[name] for name in fields})
    names = Options.__dataclass_fields__.keys() - {"server"}
    options = Options(server, **{name: flags[name] for name in names})
    with contextlib.ExitStack() as stack:
        file = None
        if output is not None:
            try:
                file = stack.enter_context(output.open("a", encoding="utf-8"))
            except OSError as error:
                raise CommandError(f"{output}: {error.strerror}", 2) from error
        report = _measured(spec, server, options)
        click.echo(table(report))
        if file is not None:
            file.truncate(0)  # only now: what was there is kept if there is no server
            file.write(json.dumps(report.document(spec, options), indent=1) + "\n")
    if report.num_failed:
        raise CommandError(f"{report.num_failed:,} requests failed")


def _measured(spec: WorkloadSpec, server: Server, options: Options) -> Report:
    with _bars() as bars:
        try:
            return measure(spec, options, bars.begin)
        except (WorkloadError, TraceError) as error:
            raise CommandError(str(error), 2) from error
        except LoadError as error:
            raise CommandError(str(error)) from error
        except BlockyardError as error:
            raise server.explain(error) from error


class _Bars:
    """One progress bar after the other, if somebody watches."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._num_tokens = 0
        self._num_failed = 0

    def begin(self, phase: Phase) -> Watch:
        """A bar for the load that starts."""
        self.close()
        self._num_tokens = self._num_failed = 0
        is_hidden = not sys.stderr.isatty()
        self._bar = tqdm(
            total=phase.num_requests,
            desc=phase.name,
            unit="req",
            file=sys.stderr,
            disable=is_hidden,
        )
        return self._on_progress

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()

    def _on_progress(self, progress: Progress) -> None:
        assert self._bar is not None
        self._num_tokens += progress.num_tokens
        self._num_failed += progress.num_failed
        failed = f", {self._num_failed:,} failed" if self._num_failed else ""
        self._bar.set_postfix_str(f"{self._num_tokens:,} tokens{failed}", refresh=False)
        self._bar.update(progress.num_ended)


@contextlib.contextmanager
def _bars() -> Iterator[_Bars]:
    bars = _Bars()
    try:
        yield bars
    finally:
        bars.close()

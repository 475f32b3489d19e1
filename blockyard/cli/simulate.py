"""`blockyard simulate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from tqdm import tqdm

from blockyard.cli.errors import CommandError
from blockyard.simulate.device import DEFAULT_PROFILE, PRESETS, ProfileError, load_profile
from blockyard.simulate.generator import GENERATORS, generate
from blockyard.simulate.plot import PlotError, check_plot, plot_pools
from blockyard.simulate.policies import POLICY_NAMES
from blockyard.simulate.run import Outcome, simulate
from blockyard.simulate.setup import (
    PREEMPTION_NAMES,
    Setup,
    SetupError,
    Sizes,
    blocks_in,
    make_setup,
)
from blockyard.simulate.summary import SHORT_PROMPT_TOKENS, Report, make_report, table
from blockyard.simulate.trace import Trace, TraceError
from blockyard.simulate.trace_files import FORMATS, read_trace

_CLOSED: Final = "closed"
_KV_GIB: Final = 54.0
_POSITIVE: Final = click.IntRange(1)


def _rate(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | str | None:
    """A positive number of requests per second, or "closed"."""
    if value is None or value == _CLOSED:
        return value
    try:
        rate = float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor {_CLOSED!r}") from error
    if not 0 < rate < float("inf"):
        raise click.BadParameter(f"{value}: a rate must be positive")
    return rate


@click.command()
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Trace file.")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="auto", show_default=True)
@click.option("--generate", "generator", type=click.Choice(GENERATORS), help="Instead of a file.")
@click.option("--requests", type=_POSITIVE, help="How many; default: the file's, or 2,000.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="To generate.")
@click.option(
    "--rate",
    metavar="N|closed",
    callback=_rate,
    help='Arrivals per second, or "closed": all at time 0.',
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice((*POLICY_NAMES, "all")),
    multiple=True,
    default=("blockyard",),
    show_default=True,
    help="Repeatable: side by side.",
)
@click.option("--blocks", type=_POSITIVE, help="Of the device pool.")
@click.option(
    "--kv-gib",
    type=click.FloatRange(0, min_open=True),
    help=f"The device pool by its size; default: {_KV_GIB:g} GiB.",
)
@click.option("--block-size", type=_POSITIVE, default=16, show_default=True, help="Tokens.")
@click.option("--host-blocks", type=click.IntRange(0), default=0, show_default=True)
@click.option("--max-num-seqs", type=_POSITIVE, default=256, show_default=True)
@click.option("--max-num-batched-tokens", type=_POSITIVE, default=8192, show_default=True)
@click.option("--max-model-len", type=click.IntRange(2), default=8192, show_default=True)
@click.option("--preemption", type=click.Choice(PREEMPTION_NAMES), default="auto")
@click.option("--window", type=click.IntRange(1, 3), default=2, show_default=True)
@click.option(
    "--cost-model",
    default=DEFAULT_PROFILE,
    show_default=True,
    metavar="NAME|FILE",
    help=f"{', '.join(PRESETS)}, or a JSON file.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the pools: .png or .svg.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def command(**flags: Any) -> None:
    """Replay a trace against the scheduler, on a simulated device and a virtual clock.

    \b
    blockyard simulate --generate azure --policy all
    blockyard simulate --trace conversation_trace.jsonl --max-model-len 131072
    """
    try:
        if flags["plot"] is not None:
            check_plot(flags["plot"])
        trace = _trace(flags)
        setups = _setups(flags)
        outcomes = {name: _simulated(name, trace, setup) for name, setup in setups.items()}
        report = make_report(trace, outcomes)
        _print(report)
        if flags["json_path"] is not None:
            _write_json(flags["json_path"], report)
        if flags["plot"] is not None:
            plot_pools(flags["plot"], outcomes)
    except (TraceError, ProfileError, SetupError, PlotError) as error:
        raise CommandError(str(error), 2) from error


def _trace(flags: dict[str, Any]) -> Trace:
    if (flags["trace_path"] is None) == (flags["generator"] is None):
        raise click.UsageError("give either --trace or --generate")
    if flags["generator"] is not None:
        trace = generate(flags["generator"], flags["requests"] or 2000, flags["seed"])
    else:
        trace = read_trace(flags["trace_path"], flags["kind"])
        trace = trace.take(flags["requests"] or len(trace))
    rate = flags["rate"]
    if rate is None:
        return trace
    return trace.all_at_once() if rate == _CLOSED else trace.at_rate(rate)


def _setups(flags: dict[str, Any]) -> dict[str, Setup]:
    """By the policies' names, in the order of POLICY_NAMES."""
    if flags["blocks"] is not None and flags["kv_gib"] is not None:
        raise click.UsageError("give either --blocks or --kv-gib")
    profile = load_profile(flags["cost_model"])
    kv_gib = flags["kv_gib"] or _KV_GIB
    sizes = Sizes(
        num_blocks=flags["blocks"] or blocks_in(kv_gib, flags["block_size"], profile),
        block_size=flags["block_size"],
        max_num_seqs=flags["max_num_seqs"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        max_model_len=flags["max_model_len"],
        num_host_blocks=flags["host_blocks"],
    )
    wanted = POLICY_NAMES if "all" in flags["policies"] else flags["policies"]
    return {
        name: make_setup(name, sizes, profile, flags["preemption"], flags["window"])
        for name in POLICY_NAMES
        if name in wanted
    }


def _simulated(name: str, trace: Trace, setup: Setup) -> Outcome:
    bar: tqdm[NoReturn]
    is_hidden = not sys.stderr.isatty()
    with tqdm(total=len(trace), desc=name, unit="req", file=sys.stderr, disable=is_hidden) as bar:
        outcome = simulate(trace, setup, bar.update)
        bar.update(outcome.num_skipped)
    return outcome


def _print(report: Report) -> None:
    click.echo(
        f"{report.trace_name}: {report.num_requests:,} requests on {report.profile}, "
        f"{report.num_blocks:,} blocks of {report.block_size} tokens"
    )
    if report.ideal_hit_ratio:
        click.echo(f"prompt tokens that an infinite cache has: {report.ideal_hit_ratio:.2%}")
    click.echo("\n" + table(report.policies))
    short_prompts = {name: waste for name, waste in report.short_prompt_waste.items() if waste}
    if short_prompts:
        click.echo(f"\nKV waste of one {SHORT_PROMPT_TOKENS}-token prompt alone:")
    for name, waste in short_prompts.items():
        cases = ", ".join(f"{ratio:.1%} with {n} output tokens" for n, ratio in waste.items())
        click.echo(f"  {name}: {cases}")


def _write_json(path: Path, report: Report) -> None:
    try:
        path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", 2) from error

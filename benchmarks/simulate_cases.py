"""What the studies by simulation share: traces, setups, and curves to look at."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from tqdm import tqdm

from benchmarks.report import RESULTS_DIR, ROOT
from blockyard.simulate.device import DEFAULT_PROFILE, DeviceProfile, load_profile
from blockyard.simulate.generator import generate
from blockyard.simulate.plot import PlotError, load_pyplot
from blockyard.simulate.run import simulate
from blockyard.simulate.setup import Setup
from blockyard.simulate.summary import Summary, summarise
from blockyard.simulate.trace import Trace, TraceError
from blockyard.simulate.trace_files import read_trace

PROFILE: Final[DeviceProfile] = load_profile(DEFAULT_PROFILE)
KV_GIB: Final = 54.0
"""What is left for KV of 80 GB beside 16 GB of weights, with room for activations."""

_FILES: Final = {
    "azure": ROOT / "traces" / "azure_conv_2023.csv",
    "mooncake": ROOT / "traces" / "mooncake_conversation.jsonl",
}
_GENERATED: Final = {"azure": 19_366, "mooncake": 2000}

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> x and y values."""


def parser(
    description: str | None, kind: str, *, can_plot: bool = False
) -> argparse.ArgumentParser:
    """Flags of a study over a trace of this kind: its path and, if it can, --plot."""
    flags = argparse.ArgumentParser(description=description)
    text = "trace file; without it one with the same statistics is generated"
    flags.add_argument(f"--{kind}", dest="trace", type=pathlib.Path, help=text)
    flags.set_defaults(kind=kind, plot=False)
    if can_plot:
        flags.add_argument("--plot", action="store_true", help="also draw; needs matplotlib")
    return flags


def start(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, Trace]:
    """Read the flags and the trace; exits with 2 if something that they ask for is not there."""
    flags = arguments.parse_args()
    try:
        if flags.plot:
            load_pyplot()
        return flags, _load(flags.kind, flags.trace)
    except (TraceError, PlotError) as error:
        arguments.error(str(error))


def _load(kind: str, path: pathlib.Path | None) -> Trace:
    """The trace at `path`; by default the usual file or, if that is not there, a generated one."""
    if path is not None:
        return read_trace(path, kind)
    if _FILES[kind].exists():
        return read_trace(_FILES[kind], kind)
    return generate(kind, _GENERATED[kind], seed=0)


def run(label: str, trace: Trace, setup: Setup) -> Summary:
    """Simulate, with a progress bar that says `label`."""
    bar: tqdm[NoReturn]
    with tqdm(total=len(trace), desc=label, unit="req", mininterval=1) as bar:
        return summarise(simulate(trace, setup, bar.update))


def draw(name: str, panels: Mapping[str, Curves], x_label: str, y_label: str) -> None:
    """Write results/NAME.svg: one panel of curves beside the other, x logarithmic."""
    pyplot: Any = load_pyplot()
    figure, grid = pyplot.subplots(
        1, len(panels), sharey=True, squeeze=False, figsize=(4.2 * len(panels), 3.2)
    )
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        for label, (x, y) in curves.items():
            axes.plot(x, y, marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel(y_label)
    grid[0, -1].legend(fontsize="small")
    figure.tight_layout()
    path = RESULTS_DIR / f"{name}.svg"
    figure.savefig(path)
    print(f"drawn: {path.relative_to(ROOT)}", flush=True)

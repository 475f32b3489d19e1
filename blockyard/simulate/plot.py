"""Pictures of simulations. matplotlib is imported when one is drawn: nothing else needs it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from blockyard.simulate.run import Outcome
from blockyard.simulate.trace import NS_PER_S

_INCHES: Final = (8.0, 2.4)
"""Width, and height of one panel."""
_COLOURS: Final = ("#4878a8", "#e08a3c", "#e6e6e6")


class PlotError(Exception):
    """A picture that cannot be drawn; the message says why."""


def check_plot(path: Path) -> None:
    """Raise PlotError now, rather than after a long simulation, if `plot_pools` could not draw."""
    load_pyplot()
    if path.suffix not in (".png", ".svg"):
        raise PlotError(f"{path}: pictures are .png or .svg")


def plot_pools(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Draw what the device pool held over virtual time, one panel for each policy.

    Raises:
        PlotError: no matplotlib, a suffix other than .png and .svg, a path that cannot be written.
    """
    check_plot(path)
    pyplot = load_pyplot()
    size = (_INCHES[0], _INCHES[1] * len(outcomes))
    figure, grid = pyplot.subplots(len(outcomes), 1, sharex=True, squeeze=False, figsize=size)
    for axes, (name, outcome) in zip(grid[:, 0], outcomes.items(), strict=True):
        _draw_pool(axes, name, outcome)
    grid[0, 0].legend(loc="lower right", ncols=4, fontsize="small")
    grid[-1, 0].set_xlabel("virtual time [s]")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def _draw_pool(axes: Any, name: str, outcome: Outcome) -> None:
    timeline, limits = outcome.meter.timeline, outcome.setup.limits
    num_slots = limits.num_usable_blocks * limits.block_size
    time_s = np.array(timeline.time_ns) / NS_PER_S
    used = 100 * np.array(timeline.num_used_slots) / num_slots
    unused = 100 * np.array(timeline.num_unused_slots) / num_slots
    labels = ("token states", "held, unused", "not held")
    axes.stackplot(time_s, used, unused, 100 - used - unused, labels=labels, colors=_COLOURS)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("device slots [%]")
    waste = 100 * outcome.meter.unused / outcome.meter.held
    axes.set_title(f"{name}: {waste:.2f} % of what is held is waste", fontsize="medium")
    twin = axes.twinx()
    twin.plot(time_s, timeline.num_running, color="black", linewidth=0.8)
    twin.set_ylim(0, max(timeline.num_running) * 1.1)
    twin.set_ylabel("running")


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises PlotError if it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        message = "plots need matplotlib, which is not installed: pip install matplotlib"
        raise PlotError(message) from error
    matplotlib.use("Agg")  # no display
    return importlib.import_module("matplotlib.pyplot")

"""What every benchmark prints and writes: tables, targets, and on what machine it ran."""

from __future__ import annotations

import datetime
import json
import math
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from blockyard.bench.environment import machine, versions, without_folders

ROOT: Final = pathlib.Path(__file__).parent.parent
RESULTS_DIR: Final = ROOT / "benchmarks" / "results"
LOCAL_DIR: Final = ROOT / "local"
"""Ignored by git: caches of slow references."""


@dataclass(frozen=True, slots=True)
class Target:
    """A measured value beside what it must reach."""

    name: str
    value: float
    comparison: Literal["<=", ">="]
    limit: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """False also if the value is NaN."""
        return self.value <= self.limit if self.comparison == "<=" else self.value >= self.limit


def percentiles(values: npt.ArrayLike, scale: float = 1.0) -> dict[str, float]:
    """p50, p95, p99, max, mean and count of `values` [n], divided by `scale`. n must not be 0."""
    array = np.asarray(values, np.float64) / scale
    assert array.size, "nothing was measured"
    p50, p95, p99 = np.percentile(array, (50, 95, 99)).tolist()
    return {
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "max": float(array.max()),
        "mean": float(array.mean()),
        "count": array.size,
    }


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; floats get 4 significant digits."""
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    print(f"\n{title}")
    for row in cells:
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]), flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def print_targets(targets: Sequence[Target]) -> bool:
    """Print pass or fail for each; returns whether all are met."""
    rows = [
        (t.name, t.value, f"{t.comparison} {t.limit:g} {t.unit}", "pass" if t.is_met else "FAIL")
        for t in targets
    ]
    print_table("Targets", ("what", "measured", "target", "result"), rows)
    return all(target.is_met for target in targets)


def write(name: str, results: Mapping[str, Any], targets: Sequence[Target]) -> pathlib.Path:
    """Write results/NAME.json, as `document` has it; returns its path."""
    RESULTS_DIR.mkdir(exist_ok=True)
    path = RESULTS_DIR / f"{name}.json"
    text = json.dumps(document(name, results, targets), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(ROOT)}", flush=True)
    return path


def document(name: str, results: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """JSON values: the results with machine, versions, command and targets; null for no number."""
    found = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([pathlib.Path(sys.executable).name, *_command()]),
        "revision": _revision(),
        "machine": machine(),
        "versions": versions(),
        "targets": [{**asdict(target), "is_met": target.is_met} for target in targets],
        "results": results,
    }
    return cast("dict[str, Any]", _finite(found))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _command() -> list[str]:
    """As it was given, without folders that exist on this machine only."""
    script, *arguments = sys.orig_argv[1:]
    path = pathlib.Path(script)
    if path.is_absolute() and path.is_relative_to(ROOT):
        script = str(path.relative_to(ROOT))
    return [script, *map(without_folders, arguments)]


def _revision() -> str:
    """The commit, with "+" if the tree differs from it; empty outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

"""A service that tells how many objects it holds: `python -m benchmarks.object_counts OUT MODULE`.

MODULE runs as it is, with the flags that follow. At each SIGUSR1 it collects garbage and appends a
line of JSON to OUT: how many objects are left, and of which types.
"""

from __future__ import annotations

import gc
import json
import pathlib
import runpy
import signal
import sys
from collections import Counter
from types import FrameType
from typing import Final

_NUM_TYPES: Final = 15


def write_counts(path: pathlib.Path) -> None:
    """Append one line."""
    gc.collect()
    objects = gc.get_objects()
    types = Counter(type(each).__qualname__ for each in objects)
    line = {"num_objects": len(objects), "types": dict(types.most_common(_NUM_TYPES))}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(path: pathlib.Path, module: str, flags: list[str]) -> None:
    """Run the module; does not return if that exits."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        write_counts(path)

    signal.signal(signal.SIGUSR1, on_signal)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

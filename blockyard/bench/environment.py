"""Where a measurement was made: machine and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

_PACKAGES: Final = (
    *("blockyard", "grpcio", "protobuf", "numpy", "uvloop", "tokenizers"),
    *("torch", "transformers", "numba", "cupy-cuda13x"),
)


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory and system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_1_min": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Python and the packages that timings depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor()


def without_folders(word: str) -> str:
    """A word of a command line whose path, alone or after `--flag=`, is only a file's name."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return flag + equals + (Path(value).name if value.startswith("/") else value)

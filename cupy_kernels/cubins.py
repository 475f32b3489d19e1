"""Compiled kernels, on disk.

The key is everything that decides the binary: source text with its constants, flags, target and
compiler version. Files appear whole or not at all, so that processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cupy_kernels import nvrtc
from cupy_kernels.errors import GpuTooOldError
from cupy_kernels.source import Variant

MIN_CAPABILITY: Final = (8, 0)

# Fragments declare constants that not every kernel uses (remark 177).
_OPTIONS: Final = ("-std=c++17", "--ptxas-options=-v", "--diag-suppress=177")


def default_folder() -> Path:
    """Where cubins are kept unless the caller says otherwise."""
    return Path.home() / ".cache" / "blockyard" / "cubins"


def target_of(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability. Raises GpuTooOldError below 8.0.

    9.0 gets the architecture-specific target: only that one has Hopper's wgmma.
    """
    if capability < MIN_CAPABILITY:
        raise GpuTooOldError(
            f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer (A100, RTX 30 and later)"
        )
    suffix = "a" if capability == (9, 0) else ""
    return f"sm_{capability[0]}{capability[1]}{suffix}"


def build(variant: Variant, target: str) -> nvrtc.Binary:
    """Compile for a target such as sm_90a. Raises CompileError or MissingLibraryError."""
    options = (f"-arch={target}", *_OPTIONS)
    return nvrtc.compile_source(variant.text(), f"{variant.name}.cu", options)


@dataclass(frozen=True, slots=True)
class CubinCache:
    """A folder of cubins; made when first written to."""

    folder: Path

    def get(self, variant: Variant, target: str) -> Path:
        """The file of a variant, compiled if it is not there. Raises as `build` does."""
        path = self.folder / f"{variant.name}-{target}-{_key(variant, target)}.cubin"
        if not path.exists():
            _write_whole(path, build(variant, target).cubin)
        return path


def _key(variant: Variant, target: str) -> str:
    parts = (variant.text(), target, *_OPTIONS, str(nvrtc.version()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)

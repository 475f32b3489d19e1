"""NVRTC, NVIDIA's run-time compiler, through ctypes.

CuPy's own compile path asks the driver for the target, so it does nothing without a GPU, and sets
flags of its own (flush denormals). Here source, target and flags alone decide the binary.
Reference: https://docs.nvidia.com/cuda/nvrtc
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cupy_kernels.errors import CompileError, MissingLibraryError

CUDA_MAJOR: Final = 13
_LIBRARY: Final = f"libnvrtc.so.{CUDA_MAJOR}"


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code of one source, and the compiler's remarks: registers, spills, warnings."""

    cubin: bytes
    log: str


@functools.cache
def _library() -> ctypes.CDLL:
    # The wheel nvidia-cuda-nvrtc, which torch needs too, installs it where no linker looks.
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / f"cu{CUDA_MAJOR}" / "lib" / _LIBRARY
        if path.exists():
            # NVRTC opens this companion by name only; once loaded it is found.
            for companion in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(companion))
            return ctypes.CDLL(str(path))
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise MissingLibraryError(
            f"{_LIBRARY} was not found: pip install 'nvidia-cuda-nvrtc=={CUDA_MAJOR}.*'"
        ) from error


def version() -> tuple[int, int]:
    """(major, minor). Raises MissingLibraryError."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_source(source: str, name: str, options: Sequence[str]) -> Binary:
    """Compile one translation unit.

    Args:
        source: the whole text.
        name: how messages call it.
        options: NVRTC's; one of them must be -arch=sm_*, a real architecture.

    Raises CompileError with the log, or MissingLibraryError.
    """
    library = _library()
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"{name} ({' '.join(options)}): {_error(status)}\n{log}")
        return Binary(_read(program, "CUBIN"), log)
    finally:
        _check(library.nvrtcDestroyProgram(ctypes.byref(program)))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    library = _library()
    size = ctypes.c_size_t()
    _check(library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library[f"nvrtcGet{what}"](program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC: {_error(status)}")


def _error(status: int) -> str:
    describe = _library().nvrtcGetErrorString
    describe.restype = ctypes.c_char_p
    text: bytes = describe(status)
    return text.decode()

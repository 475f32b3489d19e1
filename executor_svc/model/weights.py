"""Tensors of a model directory: safetensors only, one at a time, checked before use.

Pickled weights (.bin, .pt, .pth) are refused: unpickling runs code from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor_svc.model.codes import Codes, CodesFile
from executor_svc.model.errors import WeightsError

_FLOAT_TYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_PICKLED: Final = (".bin", ".pt", ".pth")


class TensorSource(Protocol):
    """Where a model's tensors come from."""

    @property
    def remaining(self) -> list[str]:
        """Names not taken yet, sorted."""

    def drop(self, name: str) -> None:
        """Leave a tensor unread; no error if it is not there."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, of a floating type, anywhere. Raises WeightsError."""

    def codes(self, name: str, shape: tuple[int, ...]) -> Codes | None:
        """What that tensor was decoded from, if that is known. Raises WeightsError."""


class DummyWeights:
    """Random tensors of any name, for benchmarks: timing does not depend on what a model says."""

    def __init__(self, device: torch.device) -> None:
        """Make tensors on `device`, always the same ones in the same order."""
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def remaining(self) -> list[str]:
        """None."""
        return []

    def drop(self, name: str) -> None:
        """Nothing to drop."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Ones for norms; else normally distributed bfloat16 with the usual spread of 0.02."""
        device = self._generator.device
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        return tensor.normal_(0, 0.02, generator=self._generator)

    def codes(self, name: str, shape: tuple[int, ...]) -> Codes | None:
        """None."""
        return None


class Weights:
    """Named tensors over one or several files, mapped, not read, until asked for.

    A context manager; `take` may be called while it is open, once per tensor.
    """

    def __init__(self, files: Sequence[Path], codes_file: Path | None = None) -> None:
        """Open all files. Raises WeightsError for one that is missing, damaged or pickled."""
        self._stack = ExitStack()
        self._handles: dict[str, tuple[Path, Any]] = {}
        if not files:
            raise WeightsError("the model directory holds no safetensors file")
        try:
            for path in files:
                self._open(path)
            self._codes = codes_file and self._stack.enter_context(CodesFile(codes_file))
        except WeightsError:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def remaining(self) -> list[str]:
        """Names not taken yet, sorted."""
        return sorted(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def drop(self, name: str) -> None:
        """Leave a tensor unread; no error if it is not there."""
        self._handles.pop(name, None)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor as it is stored; a float type.

        Raises WeightsError if missing, misshapen or unreadable.
        """
        if name not in self._handles:
            raise WeightsError(f"tensor {name!r} is in none of the weight files")
        path, handle = self._handles.pop(name)
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise WeightsError(f"{path}: tensor {name!r} has shape {found}, expected {shape}")
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise WeightsError(f"{path}: tensor {name!r} cannot be read: {error}") from error
        if tensor.dtype not in _FLOAT_TYPES:
            raise WeightsError(f"{path}: tensor {name!r} has type {tensor.dtype}")
        return tensor

    def codes(self, name: str, shape: tuple[int, ...]) -> Codes | None:
        """See TensorSource; whether they decode to the tensor is not checked here."""
        return self._codes.take(name, shape) if self._codes else None

    def _open(self, path: Path) -> None:
        if path.suffix in _PICKLED:
            raise WeightsError(f"{path}: pickled weights are refused; convert to safetensors")
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error
        for name in names:
            if name in self._handles:
                raise WeightsError(f"{path}: tensor {name!r} is also in {self._handles[name][0]}")
            self._handles[name] = (path, handle)

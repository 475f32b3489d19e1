"""A GGUF file: metadata with checked types, and tensors that are dequantised one at a time."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from blockyard.models.errors import ModelImportError

T = TypeVar("T")

# What reading past the end of a damaged file turns into inside the gguf package.
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError)


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModelImportError(
            "reading GGUF files needs the gguf package: pip install 'blockyard[executor]'"
        ) from error
    assert isinstance(gguf, ModuleType)
    return gguf


class GgufSource:
    """A GGUF file that was opened and whose structure was read; tensors are mapped, not read."""

    def __init__(self, path: Path) -> None:
        """Raises ModelImportError if the file is damaged or not GGUF."""
        self.path = path
        self._gguf = _gguf()
        with path.open("rb") as file:
            magic, version = struct.unpack("<II", file.read(8).ljust(8, b"\0"))
        if magic != self._gguf.GGUF_MAGIC:
            raise ModelImportError(f"{path}: not a GGUF file")
        if version not in (2, 3):
            raise ModelImportError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
        try:
            reader = self._gguf.GGUFReader(path)
        except _DAMAGE as error:
            raise ModelImportError(f"{path}: truncated or damaged GGUF file ({error})") from error
        self._fields: dict[str, Any] = dict(reader.fields)
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def architecture(self) -> str:
        """E.g. "llama"."""
        return self.require("general.architecture", str)

    @property
    def tensor_names(self) -> set[str]:
        """Names as llama.cpp writes them."""
        return set(self._tensors)

    def get(self, key: str, kind: type[T]) -> T | None:
        """The metadata value, or None if the file has none. Raises ModelImportError on a type."""
        field = self._fields.get(key)
        if field is None:
            return None
        try:
            value = field.contents()
        except _DAMAGE as error:
            raise ModelImportError(f"{self.path}: metadata {key} cannot be read") from error
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelImportError(
                f"{self.path}: metadata {key} is a {type(value).__name__}, not a {kind.__name__}"
            )
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """Like `get`, but raises ModelImportError if the key is missing."""
        value = self.get(key, kind)
        if value is None:
            raise ModelImportError(f"{self.path}: metadata {key} is missing")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as torch would say it: rows first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def format(self, name: str) -> str:
        """ggml's name of how the tensor is stored, e.g. "Q4_1"."""
        kind: str = self._tensors[name].tensor_type.name
        return kind

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """A quantised matrix as it is stored: [rows, bytes], mapped."""
        data: npt.NDArray[np.uint8] = self._tensors[name].data
        return data

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The dequantised tensor, in torch's shape. Raises ModelImportError on an unknown type."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelImportError(
                f"{self.path}: tensor {name} is quantised as {tensor.tensor_type.name}, "
                "which is not supported"
            ) from error
        return values.reshape(self.shape(name))

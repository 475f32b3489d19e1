"""Safetensors files, as bytes: an 8-byte header length, a JSON header, then the tensors.

Written tensor by tensor, so that an import never holds a whole model in memory, and checked
without reading the tensors. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from blockyard.models.errors import ModelImportError

_MAX_HEADER_BYTES: Final = 100_000_000
_ITEM_BYTES: Final = {
    dtype: item_bytes
    for item_bytes, dtypes in (
        (1, ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2")),
        (2, ("U16", "I16", "F16", "BF16")),
        (4, ("U32", "I32", "F32")),
        (8, ("U64", "I64", "F64")),
    )
    for dtype in dtypes
}

_NUMPY_TYPES: Final = {"F32": "<f4", "U8": "u1"}


class ByteSink(Protocol):
    """Takes bytes, e.g. a file or a hash beside it."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append `data`."""


def write_float32(
    sink: ByteSink,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, npt.NDArray[np.float32]]],
) -> None:
    """Write `tensors` in the order of `shapes`, each of exactly that name and shape."""
    _write(sink, "F32", shapes, tensors, {})


def write_bytes(
    sink: ByteSink,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, npt.NDArray[np.uint8]]],
    metadata: Mapping[str, str],
) -> None:
    """The same with tensors of bytes, and what the header says beside them."""
    _write(sink, "U8", shapes, tensors, metadata)


def _write(
    sink: ByteSink,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    metadata: Mapping[str, str],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors start aligned
    sink.write(struct.pack("<Q", len(encoded)) + encoded)
    for (name, shape), (given_name, array) in zip(shapes.items(), tensors, strict=True):
        assert (name, shape) == (given_name, array.shape), (name, shape, given_name, array.shape)
        sink.write(np.ascontiguousarray(array, dtype=_NUMPY_TYPES[dtype]).data.cast("B"))


def read_names(path: Path) -> set[str]:
    """Check that the file is whole and return its tensor names. Raises ModelImportError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelImportError(f"{path}: not a safetensors file, or cut off in its header")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ModelImportError(f"{path}: the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelImportError(f"{path}: the safetensors header is not an object")
    header.pop("__metadata__", None)
    end = max((_checked_end(path, name, entry) for name, entry in header.items()), default=0)
    if size != 8 + length + end:
        raise ModelImportError(
            f"{path}: truncated or damaged: {size} bytes, its header asks for {8 + length + end}"
        )
    return set(header)


def _checked_end(path: Path, name: str, entry: object) -> int:
    """Where the tensor's data ends [bytes from the first tensor]."""
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(start), int(end)],
        } if dtype in _ITEM_BYTES and all(isinstance(size, int) and size >= 0 for size in shape):
            if start >= 0 and end - start == math.prod(shape) * _ITEM_BYTES[dtype]:
                return end
    raise ModelImportError(f"{path}: the header's entry of tensor {name!r} makes no sense")

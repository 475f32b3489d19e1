"""Quantised weights beside the float32 ones: the blocks that a GGUF file holds them in.

A block is 32 weights of one row, little-endian, as ggml lays it out; d and m are float16:

    Q4_0  d, 16 bytes          w = d * (q - 8)
    Q4_1  d, m, 16 bytes       w = d * q + m
    Q8_0  d, 32 signed bytes   w = d * q

Byte j of 16 holds weight j in its low and weight j + 16 in its high four bits. d * q is exact in
float32, so a weight has one float32 value, whoever decodes it, with or without a fused
multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor_svc.model.errors import WeightsError

BLOCK_WEIGHTS: Final = 32


class BlockFormat(StrEnum):
    """ggml's name of how a block is laid out."""

    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q8_0 = "Q8_0"

    @property
    def block_bytes(self) -> int:
        """Size of a block [bytes]."""
        return {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[self]


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight [out_features, in_features] in blocks."""

    name: str
    """For people: of the weight, or of the first of those stacked."""
    format: BlockFormat
    blocks: Tensor  # [out_features, in_features / 32 * block_bytes] uint8


def stack(parts: Sequence[Codes | None]) -> Codes | None:
    """The codes of all rows of the parts; None if a part has none or another format."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts) or len({part.format for part in present}) != 1:
        return None
    first = present[0]
    return Codes(first.name, first.format, torch.cat([part.blocks for part in present]))


class CodesFile:
    """Codes by the names of their weights: safetensors whose metadata gives each one's format.

    A context manager; `take` may be called while it is open.
    """

    def __init__(self, path: Path) -> None:
        """Raises WeightsError if the file is missing or damaged."""
        self._path = path
        try:
            file: Any = safe_open(path, framework="pt")
            self._file = file
            self._formats = dict(file.metadata() or {})
            self._names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a readable codes file: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.__exit__(error_type, error, traceback)

    def take(self, name: str, shape: tuple[int, ...]) -> Codes | None:
        """Codes of a weight of this shape, None if the file has none of that name.

        Raises WeightsError if they cannot be of this shape, or cannot be read.
        """
        if name not in self._names:
            return None
        found = self._formats.get(name)
        if found not in set(BlockFormat):
            raise WeightsError(f"{self._path}: {name!r} has the unknown format {found!r}")
        block_format = BlockFormat(found)
        out_features, in_features = shape
        expected = [out_features, in_features // BLOCK_WEIGHTS * block_format.block_bytes]
        entry = self._file.get_slice(name)
        if (
            in_features % BLOCK_WEIGHTS
            or entry.get_shape() != expected
            or entry.get_dtype() != "U8"
        ):
            raise WeightsError(
                f"{self._path}: {name!r} has {entry.get_dtype()} blocks of shape "
                f"{entry.get_shape()}, not those of a {found} weight of shape {list(shape)}"
            )
        try:
            return Codes(name, block_format, self._file.get_tensor(name))
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise WeightsError(f"{self._path}: {name!r} cannot be read: {error}") from error

"""What the attention kernels are specialised for, and the layout of a KV block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from cupy_kernels.errors import UnsupportedShapeError

ElementType = Literal["bfloat16", "float16"]

TILE_TOKENS: Final = 16
HEAD_DIMS: Final = (64, 96, 128, 256)
BLOCK_SIZES: Final = (16, 32, 64)
ELEMENTS: Final = ("bfloat16", "float16")
MAX_GROUP: Final = 16
LOG2_E: Final = 1.4426950408889634
"""Softmaxes are taken in base 2."""

_ELEMENT_BYTES: Final = 2
_CHUNK: Final = 8  # elements in 16 bytes
_GROUP_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads, cache layout and element type of a model.

    A block holds block_size tokens of all layers in one run of memory:
    [num_layers][num_kv_heads][block_size / 16 tiles][tile], see `element_offsets` for the tile.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    element: ElementType = "bfloat16"

    def __post_init__(self) -> None:
        """Raises UnsupportedShapeError for what the kernels do not do."""
        for name, value, choices in (
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("element", self.element, ELEMENTS),
        ):
            if value not in choices:
                listed = ", ".join(str(choice) for choice in choices)
                raise UnsupportedShapeError(f"{name} {value} is not one of {listed} (GPU kernels)")
        if min(self.num_layers, self.num_heads, self.num_kv_heads) < 1:
            raise UnsupportedShapeError(f"layers and heads must be positive: {self}")
        if self.num_heads % self.num_kv_heads or self.group > MAX_GROUP:
            raise UnsupportedShapeError(
                f"{self.num_heads} query heads over {self.num_kv_heads} KV heads: the kernels need "
                f"a whole number per KV head, at most {MAX_GROUP}"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_bytes(self) -> int:
        """Keys and values of 16 tokens of one layer and KV head."""
        return 2 * TILE_TOKENS * self.head_dim * _ELEMENT_BYTES

    @property
    def layer_bytes(self) -> int:
        """One layer's part of a block."""
        return self.num_kv_heads * (self.block_size // TILE_TOKENS) * self.tile_bytes

    @property
    def block_bytes(self) -> int:
        """A block over all layers, keys and values."""
        return self.num_layers * self.layer_bytes

    @property
    def qkv_size(self) -> int:
        """Elements per token of packed queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def defines(self) -> dict[str, int]:
        """Compile-time constants of every kernel that touches heads."""
        return {"HEAD_DIM": self.head_dim, "ELEMENT_BF16": int(self.element == "bfloat16")}


def element_offsets(head_dim: int) -> npt.NDArray[np.int64]:
    """Where each element of a tile lies: [2 (K, V), 16 tokens, head_dim] -> element offset.

    The twin of sources/kv_tile.cuh, which says why: [2 groups of 8 tokens][K | V][atoms][8 tokens]
    [64 or 32 elements], 16-byte chunks of a token permuted by the token's number.
    """
    atom_dims = 64 if head_dim % 64 == 0 else 32
    is_value, token, dim = np.meshgrid(
        np.arange(2), np.arange(TILE_TOKENS), np.arange(head_dim), indexing="ij"
    )
    in_group = token % _GROUP_TOKENS
    swizzle = in_group if atom_dims == 64 else in_group // 2
    chunk = (dim % atom_dims // _CHUNK) ^ swizzle
    offsets: npt.NDArray[np.int64] = (
        token // _GROUP_TOKENS * (2 * _GROUP_TOKENS * head_dim)
        + is_value * (_GROUP_TOKENS * head_dim)
        + dim // atom_dims * (_GROUP_TOKENS * atom_dims)
        + in_group * atom_dims
        + chunk * _CHUNK
        + dim % _CHUNK
    )
    return offsets

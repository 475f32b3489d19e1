"""Shapes that are refused, and the layout of a tile."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_kernels.errors import UnsupportedShapeError
from cupy_kernels.shape import HEAD_DIMS, TILE_TOKENS, AttentionShape, element_offsets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80}, "head_dim 80 is not one of 64, 96, 128, 256"),
        ({"block_size": 8}, "block_size 8"),
        ({"block_size": 48}, "block_size 48"),
        ({"element": "float32"}, "element float32"),
        ({"num_heads": 12, "num_kv_heads": 8}, "12 query heads over 8 KV heads"),
        ({"num_heads": 34, "num_kv_heads": 2}, "at most 16"),
        ({"num_heads": 0}, "must be positive"),
        ({"num_layers": 0}, "must be positive"),
        ({"num_kv_heads": 0}, "must be positive"),
    ],
)
def test_unsupported_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "block_size": 16,
    }
    with pytest.raises(UnsupportedShapeError, match=message):
        AttentionShape(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_block_of_llama_8b_is_2_mib() -> None:
    shape = AttentionShape(32, 32, 8, 128, 16)
    assert (shape.tile_bytes, shape.layer_bytes, shape.block_bytes) == (8192, 65536, 2 << 20)
    assert shape.group == 4
    assert shape.qkv_size == 48 * 128


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_tile_holds_every_element_once(head_dim: int) -> None:
    offsets = element_offsets(head_dim)
    assert offsets.shape == (2, TILE_TOKENS, head_dim)
    assert sorted(offsets.ravel()) == list(range(2 * TILE_TOKENS * head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_chunk_of_eight_tokens_lies_in_all_banks(head_dim: int) -> None:
    chunks = element_offsets(head_dim)[:, :, ::8]  # first elements of 16-byte chunks
    np.testing.assert_array_equal(chunks % 8, 0)
    np.testing.assert_array_equal(element_offsets(head_dim)[:, :, 7::8], chunks + 7)
    bank_sets = chunks // 8 % 8  # of four 4-byte banks
    for is_value in range(2):
        for first in range(0, TILE_TOKENS, 8):
            for chunk in range(head_dim // 8):
                together = bank_sets[is_value, first : first + 8, chunk]
                assert sorted(together) == list(range(8))

"""Operands that prefill_wgmma names by descriptors, against the layout of a tile.

`operand_offsets` is what the PTX ISA says of descriptors with 128-byte swizzle: 8 rows of 128 bytes
are an atom, and bits 4 to 6 of an address are those that it would have plainly, xor bits 7 to 9.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cupy_kernels import nvrtc
from cupy_kernels.prefill import prefill_items, wgmma_prefill
from cupy_kernels.shape import TILE_TOKENS, AttentionShape, element_offsets
from cupy_kernels.tests.compiling import needs_nvrtc

SPAN_TILES = 8
ATOM_BYTES = 1024
STEP = 16  # indices of summation per product

IntArray = npt.NDArray[np.int64]


def operand_offsets(
    begin: int, group_stride: int, atom_stride: int, rows: int, columns: int
) -> IntArray:
    """Byte offsets of elements [rows, columns], columns lying side by side in memory."""
    row, column = np.indices((rows, columns))
    plain = begin + row // 8 * group_stride + row % 8 * 128
    plain = plain + column // 64 * atom_stride + column % 64 * 2
    offsets: IntArray = plain ^ (plain >> 7 & 7) << 4
    return offsets


def span_offsets(head_dim: int) -> IntArray:
    """Byte offsets [K, V][tokens][head_dim] in a span, its tiles one behind the other."""
    tile = 2 * element_offsets(head_dim)
    tile_bytes = tile.size * 2
    return np.concatenate([tile + i * tile_bytes for i in range(SPAN_TILES)], axis=1)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_are_rows_of_an_operand(head_dim: int) -> None:
    keys = span_offsets(head_dim)[0]
    for step in range(head_dim // STEP):
        begin = step // 4 * ATOM_BYTES + step % 4 * 2 * STEP
        offsets = operand_offsets(begin, 32 * head_dim, 16, len(keys), STEP)
        np.testing.assert_array_equal(offsets, keys[:, STEP * step : STEP * (step + 1)])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_values_are_an_operand_whose_rows_are_summed_over(head_dim: int) -> None:
    values = span_offsets(head_dim)[1]
    for tile in range(SPAN_TILES):
        begin = tile * 64 * head_dim + 16 * head_dim
        offsets = operand_offsets(begin, 32 * head_dim, ATOM_BYTES, TILE_TOKENS, head_dim)
        np.testing.assert_array_equal(offsets, values[STEP * tile : STEP * (tile + 1)])


@needs_nvrtc
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_source_has_these_numbers(head_dim: int) -> None:
    shape = AttentionShape(1, 8, 8, head_dim, 16)
    kernel = wgmma_prefill(shape)
    row = np.zeros(1, np.int32)
    longest = prefill_items(shape, row, row + 1000, row)[:, 2].max()
    checks = {
        "kSpanTiles": SPAN_TILES,
        "kTileTokens": STEP,
        "kAtomBytes": ATOM_BYTES,
        "kGroupBytes": 32 * head_dim,
        "kValueOffset": 16 * head_dim,
        "kTileBytes": 64 * head_dim,
        "kAtomSteps": 4,
        "kThreads": kernel.threads,
        "kConsumers * kRows": longest,
        "kWordsOffset + kConsumers * kWarpgroupThreads * 4": kernel.shared_bytes,
        "kQueryOffset % kAtomBytes + kQueryBytes % kAtomBytes + kSpanBytes % kAtomBytes": 0,
    }
    text = kernel.variant.text() + "".join(
        f'static_assert({name} == {value}, "{name}");\n' for name, value in checks.items()
    )
    nvrtc.compile_source(text, "numbers.cu", ["-arch=sm_90a", "-std=c++17"])

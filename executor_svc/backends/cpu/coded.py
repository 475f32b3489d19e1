"""Products of a few rows with quantised weights, decoded to float32 in registers as they are read.

With a row or two a product takes as long as reading its weights. Their blocks (model.codes) are a
third to a sixth of the bytes of the float32 weights that they decode to, and decode to exactly
those; only the order of summation differs from other products'. Arrays are flat.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from numba import prange
from torch import Tensor

from executor_svc.backends.cpu.jit import inlined, parallel_kernel
from executor_svc.backends.cpu.simd import (
    LANES,
    BytesArray,
    FloatArray,
    Vector,
    add,
    all_equal,
    fma,
    load,
    load_bytes,
    load_half_splat,
    load_high_nibbles,
    load_low_nibbles,
    mul,
    splat,
    sum_lanes,
    zero,
)
from executor_svc.model.codes import BLOCK_WEIGHTS, BlockFormat, Codes
from executor_svc.model.errors import WeightsError

# The kernels' names of the formats: constants, so that no loop asks which one it is.
_Q4_0: Final = 0
_Q4_1: Final = 1
_Q8_0: Final = 2
_KINDS: Final = {BlockFormat.Q4_0: _Q4_0, BlockFormat.Q4_1: _Q4_1, BlockFormat.Q8_0: _Q8_0}
_Q4_0_BYTES: Final = BlockFormat.Q4_0.block_bytes
_Q4_1_BYTES: Final = BlockFormat.Q4_1.block_bytes
_Q8_0_BYTES: Final = BlockFormat.Q8_0.block_bytes


class CodedLinear:
    """One projection from codes; see Linear."""

    def __init__(self, codes: Codes, weight: Tensor, bias: Tensor | None) -> None:
        """Raises WeightsError unless the codes decode to weight [out_features, in_features]."""
        self._out_features, self._in_features = weight.shape
        self._kind = _KINDS[codes.format]
        self._blocks: BytesArray = codes.blocks.contiguous().view(-1).numpy()
        self._bias: FloatArray = np.empty(0, np.float32) if bias is None else bias.numpy()
        is_equal = np.zeros(self._out_features, np.bool_)
        compare(self._blocks, self._kind, weight.contiguous().view(-1).numpy(), is_equal)
        if not is_equal.all():
            raise WeightsError(
                f"the codes of {codes.name!r} do not decode to the float32 weights beside them"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        out = torch.empty(x.shape[0], self._out_features)
        flat = x.view(-1).numpy()
        multiply(
            self._blocks, self._kind, flat, self._in_features, self._bias, out.view(-1).numpy()
        )
        return out


@inlined
def _block_bytes(kind: int) -> int:
    if kind == _Q8_0:
        return _Q8_0_BYTES
    if kind == _Q4_1:
        return _Q4_1_BYTES
    return _Q4_0_BYTES


@inlined
def _decode(blocks: BytesArray, at: int, kind: int) -> tuple[Vector, Vector]:
    """The first and the last 16 weights of the block at blocks[at:]."""
    scale = load_half_splat(blocks, at)
    if kind == _Q8_0:
        first, last = load_bytes(blocks, at + 2), load_bytes(blocks, at + 2 + LANES)
        return mul(first, scale), mul(last, scale)
    if kind == _Q4_1:
        offset = load_half_splat(blocks, at + 2)
        first, last = load_low_nibbles(blocks, at + 4), load_high_nibbles(blocks, at + 4)
        return fma(first, scale, offset), fma(last, scale, offset)
    minus_8 = splat(np.float32(-8))
    first, last = load_low_nibbles(blocks, at + 2), load_high_nibbles(blocks, at + 2)
    return mul(add(first, minus_8), scale), mul(add(last, minus_8), scale)


@inlined
def _dot_one(
    blocks: BytesArray, at: int, kind: int, x: FloatArray, begin: int, size: int
) -> np.float32:
    """The row of weights at blocks[at:] times x[begin : begin + size]."""
    sums, more_sums = zero(), zero()
    for i in range(begin, begin + size, BLOCK_WEIGHTS):
        first, last = _decode(blocks, at, kind)
        sums = fma(first, load(x, i), sums)
        more_sums = fma(last, load(x, i + LANES), more_sums)
        at += _block_bytes(kind)
    return sum_lanes(add(sums, more_sums))


@inlined
def _dot_four(
    blocks: BytesArray, at: int, kind: int, x: FloatArray, begins: tuple[int, ...], size: int
) -> tuple[np.float32, ...]:
    """The same with four tokens, which share what is decoded: begins[t] is where each begins."""
    begin_0, begin_1, begin_2, begin_3 = begins
    sums_0, sums_1, sums_2, sums_3 = zero(), zero(), zero(), zero()
    for i in range(0, size, BLOCK_WEIGHTS):
        j = i + LANES
        first, last = _decode(blocks, at, kind)
        sums_0 = fma(last, load(x, begin_0 + j), fma(first, load(x, begin_0 + i), sums_0))
        sums_1 = fma(last, load(x, begin_1 + j), fma(first, load(x, begin_1 + i), sums_1))
        sums_2 = fma(last, load(x, begin_2 + j), fma(first, load(x, begin_2 + i), sums_2))
        sums_3 = fma(last, load(x, begin_3 + j), fma(first, load(x, begin_3 + i), sums_3))
        at += _block_bytes(kind)
    return sum_lanes(sums_0), sum_lanes(sums_1), sum_lanes(sums_2), sum_lanes(sums_3)


@inlined
def _multiply_row(
    row: int,
    blocks: BytesArray,
    kind: int,
    x: FloatArray,
    in_features: int,
    num_tokens: int,
    start: np.float32,
    out: FloatArray,
) -> None:
    """One output feature of all tokens, four at a time; `start` is its bias."""
    at = row * (in_features // BLOCK_WEIGHTS) * _block_bytes(kind)
    stride = out.size // num_tokens
    last = num_tokens - 1
    for t in range(0, num_tokens, 4):
        if t == last:
            out[t * stride + row] = start + _dot_one(
                blocks, at, kind, x, t * in_features, in_features
            )
        else:
            # Of two or three the last one is computed again; decoding costs more than that.
            t_2, t_3 = min(t + 2, last), min(t + 3, last)
            begins = (t * in_features, (t + 1) * in_features, t_2 * in_features, t_3 * in_features)
            dots = _dot_four(blocks, at, kind, x, begins, in_features)
            out[t * stride + row] = start + dots[0]
            out[(t + 1) * stride + row] = start + dots[1]
            out[t_2 * stride + row] = start + dots[2]
            out[t_3 * stride + row] = start + dots[3]


@parallel_kernel
def multiply(
    blocks: BytesArray,
    kind: int,
    x: FloatArray,
    in_features: int,
    bias: FloatArray,
    out: FloatArray,
) -> None:
    """out [T, out_features] = x [T, in_features] times the weights, plus bias.

    Args:
        blocks: [out_features, in_features / 32 * bytes of a block].
        kind: their format, one of _KINDS.
        x: [T, in_features].
        in_features: a multiple of 32.
        bias: [out_features] or empty.
        out: [T, out_features], written.
    """
    num_tokens = x.size // in_features
    for row in prange(out.size // num_tokens):
        start = bias[row] if bias.size else np.float32(0)
        if kind == _Q8_0:
            _multiply_row(row, blocks, _Q8_0, x, in_features, num_tokens, start, out)
        elif kind == _Q4_1:
            _multiply_row(row, blocks, _Q4_1, x, in_features, num_tokens, start, out)
        else:
            _multiply_row(row, blocks, _Q4_0, x, in_features, num_tokens, start, out)


@inlined
def _is_row_equal(
    blocks: BytesArray, at: int, kind: int, weight: FloatArray, begin: int, end: int
) -> bool:
    is_equal = True
    for i in range(begin, end, BLOCK_WEIGHTS):
        first, last = _decode(blocks, at, kind)
        is_equal &= all_equal(first, load(weight, i)) & all_equal(last, load(weight, i + LANES))
        at += _block_bytes(kind)
    return is_equal


@parallel_kernel
def compare(
    blocks: BytesArray, kind: int, weight: FloatArray, is_equal: npt.NDArray[np.bool_]
) -> None:
    """is_equal [out_features]: whether each row of blocks decodes to that of weight."""
    size = weight.size // is_equal.size
    num_blocks = size // BLOCK_WEIGHTS
    for row in prange(is_equal.size):
        begin, end = row * size, (row + 1) * size
        if kind == _Q8_0:
            at = row * num_blocks * _Q8_0_BYTES
            is_equal[row] = _is_row_equal(blocks, at, _Q8_0, weight, begin, end)
        elif kind == _Q4_1:
            at = row * num_blocks * _Q4_1_BYTES
            is_equal[row] = _is_row_equal(blocks, at, _Q4_1, weight, begin, end)
        else:
            at = row * num_blocks * _Q4_0_BYTES
            is_equal[row] = _is_row_equal(blocks, at, _Q4_0, weight, begin, end)

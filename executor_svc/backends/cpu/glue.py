"""The small kernels between matrix products: norms, activation, rotation, storing keys and values.

One row at a time in a helper, then a loop over rows: on one thread when the step is small, because
waking a second thread costs more than it saves, otherwise on all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import prange

from executor_svc.backends.cpu.jit import inlined, parallel_kernel
from executor_svc.backends.cpu.simd import (
    FloatArray,
    add,
    exp,
    fma,
    load,
    mul,
    splat,
    store,
    sum_lanes,
    zero,
)
from executor_svc.backends.cpu.work import TILE, IndexArray

_MIN_PARALLEL_ROWS = 16


@inlined
def _scale_to_unit(
    x: FloatArray, at: int, size: int, weight: FloatArray, eps: np.float32, out: FloatArray
) -> None:
    """RMS-normalise x[at : at + size] times weight[:size], into the same place of out."""
    squares = zero()
    for i in range(0, size, TILE):
        part = load(x, at + i)
        squares = fma(part, part, squares)
    mean = sum_lanes(squares) / np.float32(size)
    scale = splat(np.float32(1) / np.sqrt(mean + eps))
    for i in range(0, size, TILE):
        store(out, at + i, mul(mul(load(x, at + i), scale), load(weight, i)))


@parallel_kernel
def rms_norm(x: FloatArray, weight: FloatArray, eps: np.float32, out: FloatArray) -> None:
    """x and out [T * hidden], weight [hidden]."""
    size = weight.size
    num_rows = x.size // size
    if num_rows < _MIN_PARALLEL_ROWS:
        for row in range(num_rows):
            _scale_to_unit(x, row * size, size, weight, eps, out)
    else:
        for row in prange(num_rows):
            _scale_to_unit(x, row * size, size, weight, eps, out)


@inlined
def _add_and_scale(
    residual: FloatArray,
    delta: FloatArray,
    at: int,
    weight: FloatArray,
    eps: np.float32,
    out: FloatArray,
) -> None:
    for i in range(at, at + weight.size, TILE):
        store(residual, i, add(load(residual, i), load(delta, i)))
    _scale_to_unit(residual, at, weight.size, weight, eps, out)


@parallel_kernel
def add_rms_norm(
    residual: FloatArray, delta: FloatArray, weight: FloatArray, eps: np.float32, out: FloatArray
) -> None:
    """residual += delta, then rms_norm(residual) into out; all [T * hidden]."""
    size = weight.size
    num_rows = residual.size // size
    if num_rows < _MIN_PARALLEL_ROWS:
        for row in range(num_rows):
            _add_and_scale(residual, delta, row * size, weight, eps, out)
    else:
        for row in prange(num_rows):
            _add_and_scale(residual, delta, row * size, weight, eps, out)


@inlined
def _activate(gate_up: FloatArray, row: int, size: int, out: FloatArray) -> None:
    gate, up, target = row * 2 * size, row * 2 * size + size, row * size
    # exp(-gate) first, as vectors; the division is left to the loop vectoriser.
    for i in range(0, size, TILE):
        store(out, target + i, exp(mul(load(gate_up, gate + i), splat(np.float32(-1)))))
    gates, ups = gate_up[gate : gate + size], gate_up[up : up + size]
    result = out[target : target + size]
    for i in range(size):
        result[i] = gates[i] * ups[i] / (np.float32(1) + result[i])


@parallel_kernel
def silu_mul(gate_up: FloatArray, size: int, out: FloatArray) -> None:
    """gate_up [T * 2 * size], gate first in each row; out [T * size]."""
    num_rows = out.size // size
    if num_rows < _MIN_PARALLEL_ROWS:
        for row in range(num_rows):
            _activate(gate_up, row, size, out)
    else:
        for row in prange(num_rows):
            _activate(gate_up, row, size, out)


@inlined
def _rotate(x: FloatArray, at: int, dim: int, angles: FloatArray, angle: int) -> None:
    """Rotate one head in place; angles[angle:] is cos [dim / 2], then sin [dim / 2]."""
    half = dim // 2
    minus = splat(np.float32(-1))
    for i in range(0, half, TILE):
        cos, sin = load(angles, angle + i), load(angles, angle + half + i)
        low, high = load(x, at + i), load(x, at + half + i)
        store(x, at + i, fma(low, cos, mul(minus, mul(high, sin))))
        store(x, at + half + i, fma(high, cos, mul(low, sin)))


@inlined
def _store_head(
    qkv: FloatArray, key: int, value: int, dim: int, pool: FloatArray, slot: int
) -> None:
    """Store one head's key, transposed, and value; slot is the tile's address plus the lane."""
    lane = slot % TILE
    keys, head = pool[slot : slot + TILE * dim], qkv[key : key + dim]
    for d in range(dim):
        keys[d * TILE] = head[d]
    values = slot - lane + TILE * dim + lane * dim
    for i in range(0, dim, TILE):
        store(pool, values + i, load(qkv, value + i))


@inlined
def _write_token(
    qkv: FloatArray,
    token: int,
    angles: FloatArray,
    position: int,
    q_norm: FloatArray,
    k_norm: FloatArray,
    eps: np.float32,
    pool: FloatArray,
    slot: int,
    shape: IndexArray,
) -> None:
    num_heads, num_kv_heads, dim = shape[0], shape[1], shape[2]
    begin = token * (num_heads + 2 * num_kv_heads) * dim
    for head in range(num_heads + num_kv_heads):
        at = begin + head * dim
        norm = q_norm if head < num_heads else k_norm
        if norm.size:
            _scale_to_unit(qkv[at : at + dim], 0, dim, norm, eps, qkv[at : at + dim])
        _rotate(qkv, at, dim, angles, position * dim)
    for head in range(num_kv_heads):
        key = begin + (num_heads + head) * dim
        value = key + num_kv_heads * dim
        _store_head(qkv, key, value, dim, pool, slot + head * shape[3] * 2 * TILE * dim)


@parallel_kernel
def write_kv(
    qkv: FloatArray,
    positions: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    layer: int,
    angles: FloatArray,
    q_norm: FloatArray,
    k_norm: FloatArray,
    eps: np.float32,
    pool: FloatArray,
    shape: IndexArray,
) -> None:
    """Normalise (if the norms are not empty) and rotate q and k; store k and v.

    Args:
        qkv: [T * (heads + 2 * kv_heads) * head_dim], changed in place.
        positions: [T].
        slots: [T], address of the token's tile in layer 0, KV head 0, plus its lane.
        layer: where to store.
        angles: [max_positions * head_dim], per position cos then sin.
        q_norm, k_norm: [head_dim] or empty.
        eps: of those norms.
        pool: all blocks, flat.
        shape: see attention.
    """
    offset = layer * shape[1] * shape[3] * 2 * TILE * shape[2]
    if positions.size < _MIN_PARALLEL_ROWS:
        for t in range(positions.size):
            _write_token(
                qkv, t, angles, positions[t], q_norm, k_norm, eps, pool, slots[t] + offset, shape
            )
    else:
        for t in prange(positions.size):
            _write_token(
                qkv, t, angles, positions[t], q_norm, k_norm, eps, pool, slots[t] + offset, shape
            )

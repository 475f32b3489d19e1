"""Matrix products of the CPU backend: oneDNN's packed weights, or plain ones for a row or two.

Which is faster for a single row depends on the processor: on one, the packed form took a third of
the plain form's time, on another half as long again. So both are timed once the model is loaded,
and plain weights are kept only where they win.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# oneDNN lays packed weights out for about this many rows; a few to hundreds are as fast.
_PACKED_FOR_ROWS: Final = 64
_FEW_ROWS: Final = 2
_ROUNDS: Final = 5


class CpuLinear:
    """One projection; see Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack weight [out_features, in_features] float32."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._plain: Tensor | None = weight
        self._bias = bias
        self._in_features = weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        if self._plain is not None and x.shape[0] <= _FEW_ROWS:
            return torch.nn.functional.linear(x, self._plain, self._bias)
        return self._by_packed(x)

    def _by_packed(self, x: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise.default
        result: Tensor = product(x, self._packed, self._bias, "none", [], "")
        return result

    def time_ns(self, x: Tensor) -> tuple[int, int]:
        """Of one product with x [1, in_features]: plain, packed [ns]."""
        assert self._plain is not None
        begin_ns = time.perf_counter_ns()
        torch.nn.functional.linear(x, self._plain, self._bias)
        middle_ns = time.perf_counter_ns()
        self._by_packed(x)
        return middle_ns - begin_ns, time.perf_counter_ns() - middle_ns

    def drop_plain(self) -> None:
        """Compute with the packed form alone."""
        self._plain = None

    @property
    def input(self) -> Tensor:
        """Something to multiply: [1, in_features]."""
        return torch.ones(1, self._in_features)


def choose_plain(linears: Sequence[CpuLinear]) -> bool:
    """Keep the plain weights of all of a model's projections if one row is faster with them.

    Whole models are compared, so that weights come from memory as they do in a step. Returns
    whether they are kept.
    """
    inputs = [linear.input for linear in linears]
    rounds = []
    for _ in range(_ROUNDS):
        pairs = [linear.time_ns(x) for linear, x in zip(linears, inputs, strict=True)]
        rounds.append((sum(plain for plain, _ in pairs), sum(packed for _, packed in pairs)))
    is_kept = min(plain for plain, _ in rounds) < min(packed for _, packed in rounds)
    if not is_kept:
        for linear in linears:
            linear.drop_plain()
    return is_kept

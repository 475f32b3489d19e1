"""Matrix products of the CPU backend: oneDNN's packed weights, and another form for few rows.

The other form is the codes that the weights were decoded from (coded), else the weights as they
are. Up to how many rows it is faster depends on the processor: for a single row the packed form
took a third of the plain one's time on one machine, half as long again on another. So both are
timed once the model is loaded, and the other form is kept only where it wins.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from executor_svc.backends.base import Linear
from executor_svc.backends.cpu.coded import CodedLinear
from executor_svc.model.codes import Codes

# oneDNN lays packed weights out for about this many rows; a few to hundreds are as fast.
_PACKED_FOR_ROWS: Final = 64
_FEW_ROWS: Final = (1, 2, 4, 8, 16)
_ROUNDS: Final = 3


class CpuLinear:
    """One projection; see Linear. At first it knows both forms and uses the one for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, codes: Codes | None = None) -> None:
        """Pack weight [out_features, in_features] float32.

        Raises WeightsError if the codes are not its own.
        """
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._few: Linear | None
        if codes is None:
            self._few = partial(torch.nn.functional.linear, weight=weight, bias=bias)
        else:
            self._few = CodedLinear(codes, weight, bias)
        self._most_few = max(_FEW_ROWS)
        self._bias = bias
        self._in_features = weight.shape[1]
        self.is_coded = codes is not None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        if self._few is not None and x.shape[0] <= self._most_few:
            return self._few(x)
        return self._by_packed(x)

    def _by_packed(self, x: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise.default
        result: Tensor = product(x, self._packed, self._bias, "none", [], "")
        return result

    def time_ns(self, num_rows: int) -> tuple[int, int]:
        """Of one product: in the form for few rows, packed [ns]."""
        assert self._few is not None
        x = torch.ones(num_rows, self._in_features)
        begin_ns = time.perf_counter_ns()
        self._few(x)
        middle_ns = time.perf_counter_ns()
        self._by_packed(x)
        return middle_ns - begin_ns, time.perf_counter_ns() - middle_ns

    def use_few(self, most_rows: int) -> None:
        """Use the form for few rows up to most_rows; with 0 it is let go."""
        self._most_few = most_rows
        if not most_rows:
            self._few = None


def choose_forms(linears: Sequence[CpuLinear]) -> int:
    """Up to how many rows the other form is faster than the packed one; the projections do so.

    All projections of a kind are compared, so that weights come from memory as they do in a step.
    Found by halves, as the packed form gains with every row.
    """
    found = bisect_left(_FEW_ROWS, True, key=lambda rows: not _is_few_faster(linears, rows))
    most_rows = (0, *_FEW_ROWS)[found]
    for linear in linears:
        linear.use_few(most_rows)
    return most_rows


def _is_few_faster(linears: Sequence[CpuLinear], num_rows: int) -> bool:
    rounds = []
    for _ in range(_ROUNDS):
        pairs = [linear.time_ns(num_rows) for linear in linears]
        rounds.append((sum(few for few, _ in pairs), sum(packed for _, packed in pairs)))
    return min(few for few, _ in rounds) < min(packed for _, packed in rounds)

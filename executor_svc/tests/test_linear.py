"""Packed and plain products: the same results, and the faster one is kept for a single row."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from executor_svc.backends.cpu.linear import CpuLinear, choose_plain


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 70])
def test_both_forms_compute_the_same(has_bias: bool, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    weight, x = torch.randn(48, 32), torch.randn(num_rows, 32)
    bias = torch.randn(48) if has_bias else None
    linear = CpuLinear(weight, bias)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear(x), expected)
    linear.drop_plain()
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize(("plain_ns", "is_kept"), [(5, True), (50, False)])
def test_whole_models_are_compared(
    plain_ns: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: Iterator[int] = iter([0, plain_ns, plain_ns + 20] * 100)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(steps))
    model = [CpuLinear(torch.randn(16, 16), None) for _ in range(3)]
    assert choose_plain(model) is is_kept
    assert all((linear._plain is not None) is is_kept for linear in model)

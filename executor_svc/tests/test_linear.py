"""Every form of a product computes the same, and the faster one is used for few rows."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gguf
import pytest
import torch
from torch import Tensor

from executor_svc.backends.cpu.coded import CodedLinear
from executor_svc.backends.cpu.linear import CpuLinear, choose_forms
from executor_svc.model.codes import BlockFormat, Codes
from executor_svc.model.errors import WeightsError

FORMATS = list(BlockFormat)


def quantised(block_format: BlockFormat, rows: int, columns: int) -> tuple[Codes, Tensor]:
    """Random codes and, by the gguf package, the float32 weight that they decode to."""
    kind = gguf.GGMLQuantizationType[block_format]
    torch.manual_seed(rows)
    blocks = gguf.quants.quantize(torch.randn(rows, columns).numpy(), kind)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    return Codes("w", block_format, torch.from_numpy(blocks)), weight


@pytest.mark.parametrize("block_format", FORMATS)
def test_codes_decode_to_the_bit(block_format: BlockFormat) -> None:
    codes, weight = quantised(block_format, 37, 96)
    # Every feature alone: what comes back is the weights, as sums with zeros only.
    decoded = CodedLinear(codes, weight, None)(torch.eye(96)).T
    assert torch.equal(decoded, weight)
    assert len(set(weight.flatten().tolist())) > 37


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("columns", [32, 224])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_coded_products(block_format: BlockFormat, has_bias: bool, columns: int, rows: int) -> None:
    codes, weight = quantised(block_format, rows, columns)
    bias = torch.randn(rows) if has_bias else None
    linear = CodedLinear(codes, weight, bias)
    for num_tokens in range(1, 18):
        x = torch.randn(num_tokens, columns)
        expected = torch.nn.functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("place", [0, 5, -1])
def test_codes_of_other_weights_are_refused(block_format: BlockFormat, place: int) -> None:
    codes, weight = quantised(block_format, 8, 64)
    codes.blocks.view(-1)[place] ^= 0x11
    with pytest.raises(WeightsError, match="codes of 'w' do not decode"):
        CpuLinear(weight, None, codes)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 33, 70])
@pytest.mark.parametrize("block_format", [None, BlockFormat.Q4_1])
def test_all_forms_compute_the_same(
    has_bias: bool, num_rows: int, block_format: BlockFormat | None
) -> None:
    codes, weight = quantised(block_format or BlockFormat.Q8_0, 48, 32)
    x = torch.randn(num_rows, 32)
    bias = torch.randn(48) if has_bias else None
    linear = CpuLinear(weight, bias, codes if block_format else None)
    expected = torch.nn.functional.linear(x, weight, bias)
    for most_rows in (32, 2, 0):
        linear.use_few(most_rows)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("faster_up_to", "chosen"), [(0, 0), (1, 1), (5, 4), (100, 16)])
def test_whole_models_are_compared(
    faster_up_to: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[int] = iter(())
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    model = [CpuLinear(torch.randn(16, 16), None) for _ in range(3)]
    time_ns = CpuLinear.time_ns

    def timed(linear: CpuLinear, num_rows: int) -> tuple[int, int]:
        nonlocal clock
        # One projection is slower than packed, all together are not.
        few_ns = 5 if num_rows <= faster_up_to else 50
        few_ns = 25 if linear is model[0] else few_ns
        clock = iter([0, few_ns, few_ns + 20])
        return time_ns(linear, num_rows)

    monkeypatch.setattr(CpuLinear, "time_ns", timed)
    assert choose_forms(model) == chosen
    assert all((linear._few is not None) is bool(chosen) for linear in model)
    assert all(linear._most_few == chosen for linear in model)

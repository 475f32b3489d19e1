"""Norms and activation against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cupy_kernels.device import Device
from cupy_kernels.glue import MAX_HIDDEN, AddRmsNorm, SiluMul
from cupy_kernels.shape import ElementType
from integration_tests.gpu.cases import stream

EPS = 1e-3
ELEMENTS: list[ElementType] = ["bfloat16", "float16"]
HIDDEN = [8, 576, 2048, 4096, 8200, MAX_HIDDEN]


def random(element: ElementType, *size: int) -> Tensor:
    dtype: torch.dtype = getattr(torch, element)
    return torch.randn(size, device="cuda").to(dtype)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """The float32 `expected` rounded, give or take one unit in the last place."""
    unit = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=unit, atol=1e-6)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("has_delta", [False, True])
def test_norm_equals_torch(
    device: Device, element: ElementType, hidden: int, has_delta: bool
) -> None:
    torch.manual_seed(hidden)
    kernel = AddRmsNorm(device, element, EPS)
    for num_tokens in (1, 7, 200):
        residual, weight = random(element, num_tokens, hidden), random(element, hidden)
        delta = random(element, num_tokens, hidden) if has_delta else None
        total = residual if delta is None else residual + delta
        out = torch.full_like(residual, torch.nan)
        kernel.pack(residual=residual, delta=delta, weight=weight, out=out).run(stream())
        torch.cuda.synchronize()
        assert torch.equal(residual, total)
        scale = torch.rsqrt(total.float().pow(2).mean(dim=-1, keepdim=True) + EPS)
        assert_rounded(out, total.float() * scale * weight.float())


@pytest.mark.parametrize("hidden", [12, MAX_HIDDEN + 8])
def test_hidden_sizes_that_do_not_fit_are_our_mistake(device: Device, hidden: int) -> None:
    x = random("bfloat16", 1, hidden)
    with pytest.raises(AssertionError, match=str(hidden)):
        AddRmsNorm(device, "bfloat16", EPS).pack(residual=x, delta=None, weight=x[0], out=x)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("intermediate", [8, 1536, 14336])
def test_activation_equals_torch(device: Device, element: ElementType, intermediate: int) -> None:
    torch.manual_seed(intermediate)
    for num_tokens in (1, 3, 130):
        gate_up = random(element, num_tokens, 2 * intermediate) * 8
        out = random(element, num_tokens, intermediate) * torch.nan
        SiluMul(device, element).pack(gate_up=gate_up, out=out).run(stream())
        torch.cuda.synchronize()
        gate, up = gate_up.float().chunk(2, dim=-1)
        assert_rounded(out, torch.nn.functional.silu(gate) * up)


def test_activation_of_extremes(device: Device) -> None:
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4, torch.inf, 0.0, -0.0, 1.0])
    gate_up = torch.cat([gate, torch.ones(8)]).bfloat16().cuda()[None]
    out = torch.empty(1, 8, dtype=torch.bfloat16, device="cuda")
    SiluMul(device, "bfloat16").pack(gate_up=gate_up, out=out).run(stream())
    expected = torch.tensor([0, 0, 100, 1e4, torch.inf, 0, 0, 0.7311])
    torch.testing.assert_close(out[0].cpu().float(), expected, rtol=1e-2, atol=1e-6)

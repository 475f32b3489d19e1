"""Every kernel compiles for every architecture, without spills; no GPU is needed."""

from __future__ import annotations

import re

import pytest

from cupy_kernels.cubins import build
from cupy_kernels.decode import decode_variant
from cupy_kernels.prefill import plain_prefill, prefill_kernel, wgmma_prefill
from cupy_kernels.shape import ELEMENTS, AttentionShape, ElementType
from cupy_kernels.source import Variant
from cupy_kernels.tests.compiling import needs_nvrtc
from cupy_kernels.variants import MAX_SHARED_BYTES, model_variants
from cupy_kernels.write_kv import write_kv_variant

pytestmark = needs_nvrtc

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"]
# Heads and element types take turns, so that each meets each target or size.
COMBINATIONS = [
    AttentionShape(1, 32, 8, 64, 16, "bfloat16"),
    AttentionShape(1, 128, 8, 96, 16, "float16"),
    AttentionShape(1, 128, 8, 128, 16, "bfloat16"),
    AttentionShape(1, 32, 8, 128, 16, "float16"),
    AttentionShape(1, 32, 8, 256, 16, "bfloat16"),
]


def assert_clean(variant: Variant, target: str) -> str:
    """Compiles; nothing spills, nothing is warned of. Returns the compiler's remarks."""
    binary = build(variant, target)
    assert "0 bytes spill stores, 0 bytes spill loads" in binary.log, binary.log
    assert "warning" not in binary.log, binary.log
    assert "C75" not in binary.log, binary.log  # wgmma run one by one, or setmaxnreg ignored
    assert binary.cubin[:4] == b"\x7fELF"
    return binary.log


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_of_a_model(target: str) -> None:
    shape = AttentionShape(1, 9, 3, 64, 32, "float16")
    plain = Variant("decode_plain", shape.defines)
    for variant in [plain, *model_variants(shape, MAX_SHARED_BYTES[target], target)]:
        assert_clean(variant, target)


@pytest.mark.parametrize("shape", COMBINATIONS, ids=lambda s: f"{s.head_dim}-{s.group}")
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90a"])
def test_attention_of_all_head_sizes(shape: AttentionShape, target: str) -> None:
    shared = MAX_SHARED_BYTES[target]
    variant = decode_variant(shape, shared)
    log = assert_clean(variant, target)
    ring = variant.defines["STAGES"] * 4 * shape.tile_bytes
    static = int((re.findall(r"(\d+) bytes smem", log) or ["0"])[0])
    assert ring + static <= shared
    assert_clean(write_kv_variant(shape), target)
    prefill = plain_prefill(shape)
    assert_clean(prefill.variant, target)
    assert prefill.shared_bytes <= shared


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_on_hopper(head_dim: int, element: ElementType) -> None:
    shape = AttentionShape(1, 28, 4, head_dim, 16, element)
    kernel = wgmma_prefill(shape)
    log = assert_clean(kernel.variant, "sm_90a")
    assert "smem" not in log  # dynamic memory begins at the first byte, a multiple of 1,024
    assert kernel.shared_bytes <= MAX_SHARED_BYTES["sm_90a"]


def test_only_hopper_gets_the_kernel_for_hopper() -> None:
    for shape in COMBINATIONS:
        for target in TARGETS:
            is_fit = target == "sm_90a" and shape.head_dim in (64, 128)
            name = "prefill_wgmma" if is_fit else "prefill"
            assert prefill_kernel(shape, target).variant.name == name


def test_sixteen_heads_of_256_dimensions_fit_the_registers() -> None:
    shape = AttentionShape(1, 16, 1, 256, 16)
    for target in ("sm_80", "sm_90a"):
        assert_clean(decode_variant(shape, MAX_SHARED_BYTES[target]), target)

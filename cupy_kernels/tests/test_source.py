"""Parameter structs as Python reads them, and as the compiler lays them out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cupy_kernels import nvrtc
from cupy_kernels.prefill import wgmma_prefill
from cupy_kernels.shape import AttentionShape
from cupy_kernels.source import SOURCES, Variant, params_dtype
from cupy_kernels.tests.compiling import needs_nvrtc
from cupy_kernels.variants import model_variants

SHAPE = AttentionShape(2, 32, 8, 128, 16)
VARIANTS = [
    *model_variants(SHAPE, 227 << 10),
    wgmma_prefill(SHAPE).variant,
    Variant("decode_plain", SHAPE.defines),
]


@pytest.mark.parametrize(
    "field",
    ["unsigned int x", "int x[3]", "int x, y", "std::size_t x", "Other x", "int* const x", "int"],
)
def test_fields_that_python_cannot_lay_out_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="SomeParams: cannot read"):
        params_dtype(f"struct SomeParams {{\n  int a;\n  {field};\n}};", "SomeParams")


def test_a_struct_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no struct OtherParams"):
        params_dtype("struct SomeParams {\n  int a;\n};", "OtherParams")


def test_fields_have_the_names_and_types_of_the_source() -> None:
    text = (
        "struct P {\n  const void* a;  // [n]\n  int b;\n  float2* c;\n  float d;\n  int64 e;\n};"
    )
    dtype = params_dtype(text, "P")
    kinds = {name: dtype[name] for name in dtype.names or ()}
    assert kinds == {"a": np.uint64, "b": np.int32, "c": np.uint64, "d": np.float32, "e": np.int64}
    assert [dtype.fields[name][1] for name in kinds] == [0, 8, 16, 24, 32]  # type: ignore[index]


def test_constants_and_fragments_are_part_of_the_text() -> None:
    one, other = Variant("write_kv", {"HEAD_DIM": 64}), Variant("write_kv", {"HEAD_DIM": 128})
    assert one.text().startswith("#define HEAD_DIM 64\n")
    assert one.text() != other.text()
    assert "struct alignas(16) Vector16" in one.text()
    assert "#include" not in one.text()


def test_every_source_is_a_variant_that_tests_compile() -> None:
    assert {path.stem for path in SOURCES.glob("*.cu")} == {variant.name for variant in VARIANTS}


def test_only_what_no_kernel_writes_is_read_as_constant() -> None:
    """The table of angles. See wait_for_predecessor: anything else may be read too early."""
    arguments = [
        argument
        for path in SOURCES.iterdir()
        for argument in re.findall(r"__ldg\(([^)]*)\)", path.read_text())
    ]
    assert sorted(arguments) == ["cosines + i", "sines + i"]


@needs_nvrtc
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_compiler_lays_parameters_out_alike(variant: Variant) -> None:
    dtype, struct = variant.params_dtype(), variant.params_name
    assert dtype.fields is not None
    # __INTADDR__ is what offsetof is made of in headers that NVRTC does not come with.
    checks = [f"sizeof({struct}) == {dtype.itemsize}"]
    for name, (kind, offset, *_) in dtype.fields.items():
        checks.append(f"__INTADDR__(&(({struct}*)0)->{name}) == {offset}")
        checks.append(f"sizeof({struct}::{name}) == {kind.itemsize}")
    text = variant.text() + "".join(f'static_assert({check}, "{check}");\n' for check in checks)
    nvrtc.compile_source(text, "layout.cu", ["-arch=sm_90a", "-std=c++17"])

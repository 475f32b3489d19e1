"""Vectors of 16 float32 for numba kernels: values that stay in registers.

LLVM vectorises a loop over an array, but does not keep several accumulators in registers across
an outer loop; attention needs exactly that. A vector is one zmm register with AVX-512 and two ymm
with AVX2. Offsets count elements; nothing is bounds-checked and negative offsets do not wrap.
Some are made from bytes: quantised weights (model.codes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.extending import intrinsic

from executor_svc.backends.cpu.jit import inlined

LANES: Final = 16

FloatArray = npt.NDArray[np.float32]
BytesArray = npt.NDArray[np.uint8]


class Vector:
    """Static type of a vector inside a kernel; never instantiated."""


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


_I32: Final = ir.IntType(32)
_IR_VECTOR: Final = ir.VectorType(ir.FloatType(), LANES)
_IR_INDEX: Final = ir.VectorType(_I32, LANES)
_IR_BYTES: Final = ir.VectorType(ir.IntType(8), LANES)
_VECTOR: Final[Any] = cast(Any, _VectorType)()
_declare: Final[Any] = cgutils.get_or_insert_function


@register_default(_VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        # numba does not annotate its constructors.
        super().__init__(manager, fe_type, _IR_VECTOR)  # type: ignore[no-untyped-call]


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_IR_VECTOR, ir.Undefined)
    vector = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, undefined, ir.Constant(_IR_INDEX, [0] * LANES))


def _constants(value: float) -> Any:
    return ir.Constant(_IR_VECTOR, [value] * LANES)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, c, flags=("contract",))


def _sum_pair(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


def _product_pair(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


def _max_pair(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _load(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        vector = builder.load(builder.bitcast(address, _IR_VECTOR.as_pointer()))
        vector.align = 4
        return vector

    return _VECTOR(array, types.intp), generate


def _load_16_bytes(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    address = _address(context, builder, signature.args[0], args[0], args[1])
    data = builder.load(builder.bitcast(address, _IR_BYTES.as_pointer()))
    data.align = 1
    return data


def _load_bytes(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(_load_16_bytes(context, builder, signature, args), _IR_VECTOR)

    return _VECTOR(array, types.intp), generate


def _load_low_nibbles(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _load_16_bytes(context, builder, signature, args)
        codes = builder.and_(data, ir.Constant(_IR_BYTES, [15] * LANES))
        return builder.uitofp(codes, _IR_VECTOR)

    return _VECTOR(array, types.intp), generate


def _load_high_nibbles(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _load_16_bytes(context, builder, signature, args)
        codes = builder.lshr(data, ir.Constant(_IR_BYTES, [4] * LANES))
        return builder.uitofp(codes, _IR_VECTOR)

    return _VECTOR(array, types.intp), generate


def _load_half_splat(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        half = builder.load(builder.bitcast(address, ir.HalfType().as_pointer()))
        half.align = 1
        return _broadcast(builder, builder.fpext(half, ir.FloatType()))

    return _VECTOR(array, types.intp), generate


def _store(_typing: Any, array: Any, _offset: Any, _vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(address, _IR_VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _VECTOR), generate


def _splat(_typing: Any, _value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _broadcast(builder, args[0])

    return _VECTOR(types.float32), generate


def _load_splat(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        return _broadcast(builder, builder.load(address))

    return _VECTOR(array, types.intp), generate


def _fma(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _multiply_add(builder, *args)

    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


def _binary(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def intrinsic_body(_typing: Any, _a: Any, _b: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return combine(builder, *args)

        return _VECTOR(_VECTOR, _VECTOR), generate

    return intrinsic_body


def _exp(_typing: Any, _x: Any) -> Any:
    """2**n * p(r), x = n * ln 2 + r, |r| <= ln 2 / 2; p is the Taylor polynomial of degree 7."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        x = args[0]
        for bound, is_beyond in ((-87.0, "<"), (88.0, ">")):
            limit = _constants(bound)
            x = builder.select(builder.fcmp_ordered(is_beyond, x, limit), limit, x)
        floor = _declare(
            builder.module, ir.FunctionType(_IR_VECTOR, [_IR_VECTOR]), "llvm.floor.v16f32"
        )
        log2_e = _constants(float(np.float32(1.44269504)))
        shifted = _multiply_add(builder, x, log2_e, _constants(0.5))
        n = builder.call(floor, [shifted])
        # ln 2 in two parts, so that n * ln 2 is exact to twice the precision.
        r = _multiply_add(builder, n, _constants(-0.693359375), x)
        r = _multiply_add(builder, n, _constants(float(np.float32(2.12194440e-4))), r)
        p = _constants(float(np.float32(1 / 5040)))
        for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            p = _multiply_add(builder, p, r, _constants(float(np.float32(term))))
        exponent = builder.add(builder.fptosi(n, _IR_INDEX), ir.Constant(_IR_INDEX, [127] * LANES))
        scale = builder.shl(exponent, ir.Constant(_IR_INDEX, [23] * LANES))
        return builder.fmul(p, builder.bitcast(scale, _IR_VECTOR))

    return _VECTOR(_VECTOR), generate


def _reduce(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def intrinsic_body(_typing: Any, _x: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            vector = args[0]
            width = LANES // 2
            while width:
                lanes = [(lane + width) % LANES for lane in range(LANES)]
                other = builder.shuffle_vector(vector, vector, ir.Constant(_IR_INDEX, lanes))
                vector = combine(builder, vector, other)
                width //= 2
            return builder.extract_element(vector, ir.Constant(_I32, 0))

        return types.float32(_VECTOR), generate

    return intrinsic_body


def _any_above(_typing: Any, _a: Any, _b: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        mask = builder.bitcast(builder.fcmp_ordered(">", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(_VECTOR, _VECTOR), generate


def _all_equal(_typing: Any, _a: Any, _b: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        mask = builder.bitcast(builder.fcmp_ordered("==", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("==", mask, ir.Constant(ir.IntType(LANES), -1))

    return types.boolean(_VECTOR, _VECTOR), generate


def _prefetch(_typing: Any, array: Any, _offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        function_type = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        function = _declare(builder.module, function_type, "llvm.prefetch.p0")
        for_reading, into_second_level, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
        builder.call(function, [address, for_reading, into_second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


load = cast(Callable[[FloatArray, int], Vector], intrinsic(_load))
"""load(array, offset): 16 elements of a contiguous float32 array."""
load_bytes = cast(Callable[[BytesArray, int], Vector], intrinsic(_load_bytes))
"""load_bytes(array, offset): 16 signed bytes."""
load_low_nibbles = cast(Callable[[BytesArray, int], Vector], intrinsic(_load_low_nibbles))
"""load_low_nibbles(array, offset): the low four bits, unsigned, of 16 bytes."""
load_high_nibbles = cast(Callable[[BytesArray, int], Vector], intrinsic(_load_high_nibbles))
"""load_high_nibbles(array, offset): the high four bits, unsigned, of 16 bytes."""
load_half_splat = cast(Callable[[BytesArray, int], Vector], intrinsic(_load_half_splat))
"""load_half_splat(array, offset): the float16 at two bytes, in all lanes."""
store = cast(Callable[[FloatArray, int, Vector], None], intrinsic(_store))
"""store(array, offset, vector)."""
splat = cast(Callable[[np.float32], Vector], intrinsic(_splat))
"""splat(value): the same value in all lanes."""
load_splat = cast(Callable[[FloatArray, int], Vector], intrinsic(_load_splat))
"""load_splat(array, offset): one element, in all lanes."""
fma = cast(Callable[[Vector, Vector, Vector], Vector], intrinsic(_fma))
"""fma(a, b, c): a * b + c, rounded once where the CPU can."""
add = cast(Callable[[Vector, Vector], Vector], intrinsic(_binary(_sum_pair)))
"""add(a, b)."""
mul = cast(Callable[[Vector, Vector], Vector], intrinsic(_binary(_product_pair)))
"""mul(a, b)."""
maximum = cast(Callable[[Vector, Vector], Vector], intrinsic(_binary(_max_pair)))
"""maximum(a, b): b where either is NaN."""
exp = cast(Callable[[Vector], Vector], intrinsic(_exp))
"""exp(x) to 2 ulp for -87 <= x <= 88, clamped outside (never 0, never Inf); NaN stays NaN."""
sum_lanes = cast(Callable[[Vector], np.float32], intrinsic(_reduce(_sum_pair)))
"""sum_lanes(x): the sum of the 16 lanes, in a fixed order."""
max_lanes = cast(Callable[[Vector], np.float32], intrinsic(_reduce(_max_pair)))
"""max_lanes(x): the largest lane."""
any_above = cast(Callable[[Vector, Vector], bool], intrinsic(_any_above))
"""any_above(a, b): whether a > b in any lane; NaN is above nothing."""
all_equal = cast(Callable[[Vector, Vector], bool], intrinsic(_all_equal))
"""all_equal(a, b): whether a == b in every lane; NaN equals nothing."""

prefetch = cast(Callable[[FloatArray, int], None], intrinsic(_prefetch))
"""prefetch(array, offset): have the element's cache line brought into the second-level cache."""


@inlined
def zero() -> Vector:
    """All lanes 0."""
    return splat(np.float32(0))

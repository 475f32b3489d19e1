"""All kernels that serving a model takes: what to compile ahead, and to load at start."""

from __future__ import annotations

from typing import Final

from cupy_kernels.copy_blocks import copy_blocks_variant
from cupy_kernels.decode import decode_variant, split_plan_variant
from cupy_kernels.glue import glue_variants
from cupy_kernels.prefill import prefill_kernel
from cupy_kernels.sample import sample_variant
from cupy_kernels.shape import AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.staging import staging_variants
from cupy_kernels.write_kv import write_kv_variant

# Shared memory that a block of threads can have; CUDA C++ Programming Guide, compute capabilities.
MAX_SHARED_BYTES: Final = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_87": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "sm_121": 99 << 10,
}


def model_variants(shape: AttentionShape, max_shared_bytes: int, target: str = "") -> list[Variant]:
    """The kernels for a model on a device with so much shared memory per block of threads.

    `target`, such as sm_90a, tells whether there are faster ones than those for all GPUs.
    """
    return [
        write_kv_variant(shape),
        split_plan_variant(),
        decode_variant(shape, max_shared_bytes),
        prefill_kernel(shape, target).variant,
        copy_blocks_variant(),
        *staging_variants().values(),
        *glue_variants(shape.element).values(),
        sample_variant(shape.element),
    ]

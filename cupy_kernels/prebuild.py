"""Compile a model's kernels into the cache, for any GPU, without needing one.

    python -m cupy_kernels.prebuild --heads 32 --kv-heads 8 --head-dim 128 --target sm_90a

An executor started with that cache compiles nothing. Processes, because NVRTC does not use more
than one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from cupy_kernels.cubins import CubinCache, default_folder
from cupy_kernels.errors import KernelError
from cupy_kernels.shape import BLOCK_SIZES, ELEMENTS, HEAD_DIMS, AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.variants import MAX_SHARED_BYTES, model_variants


def _build(folder: Path, variant: Variant, target: str) -> str:
    begin = time.perf_counter()
    CubinCache(folder).get(variant, target)
    return f"{target} {variant.label}: {time.perf_counter() - begin:.2f} s"


def prebuild(shape: AttentionShape, targets: Sequence[str], folder: Path) -> None:
    """Compile all variants for all targets; prints one line for each. Raises KernelError."""
    # A fork of a process that has used gRPC may hang or die.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(_build, folder, variant, target)
            for target in targets
            for variant in model_variants(shape, MAX_SHARED_BYTES[target], target)
        ]
        for job in as_completed(jobs):
            print(job.result(), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if something cannot be compiled."""
    parser = argparse.ArgumentParser(prog="cupy_kernels.prebuild", description=__doc__)
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True, choices=HEAD_DIMS)
    parser.add_argument("--block-size", type=int, default=16, choices=BLOCK_SIZES)
    parser.add_argument("--element", default="bfloat16", choices=ELEMENTS)
    parser.add_argument("--target", action="append", choices=MAX_SHARED_BYTES, required=True)
    parser.add_argument("--cache", type=Path, default=default_folder(), help="folder to fill")
    chosen = parser.parse_args(arguments)
    try:
        shape = AttentionShape(
            num_layers=1,
            num_heads=chosen.heads,
            num_kv_heads=chosen.kv_heads,
            head_dim=chosen.head_dim,
            block_size=chosen.block_size,
            element=chosen.element,
        )
        prebuild(shape, chosen.target, chosen.cache)
    except KernelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

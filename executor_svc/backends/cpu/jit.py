"""How the CPU kernels are compiled and threaded; the one place that decides both.

Two OpenMP pools serve a step: torch's (the matrix products) and numba's (everything else). They
must hand over within microseconds, because a decode step is some 300 short kernels, yet must not
spin for long: the scheduler and the clients may share the cores. Measured on 2 cores: a kernel
start costs 40 us if idle threads sleep at once (spin count 0) or after 200 turns, 1 us from 1,000
turns on; but where memory is slow one thread waits longer for the other: on such a machine a step
took 46 ms with 2,000 turns, 35 ms with 10,000, and no less with 50,000. numba's `workqueue` layer
costs 60 us, so it is no more than the fallback on machines without a system libgomp.

libgomp reads its environment when it is loaded: import this module before torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba

_config: Final[Any] = numba.config
_config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

MAX_THREADS: Final[int] = _config.NUMBA_NUM_THREADS
"""Most threads that kernels can use: one per CPU."""

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Sums may be reordered and fused, so that they vectorise; NaN and Inf keep their meaning.
_FAST_MATH: Final = {"reassoc", "contract", "nsz", "arcp"}


def kernel(function: Kernel) -> Kernel:
    """Compile a function for one thread. Cached on disk, runs without the GIL."""
    jit = numba.njit(cache=True, fastmath=_FAST_MATH, nogil=True, error_model="numpy")
    return cast(Kernel, jit(function))


def parallel_kernel(function: Kernel) -> Kernel:
    """Compile a function whose `prange` loops run on all kernel threads. Cached, without the GIL.

    numba divides a `prange` evenly: give it one turn per thread, or turns of equal cost.
    """
    jit = numba.njit(
        cache=True, fastmath=_FAST_MATH, nogil=True, error_model="numpy", parallel=True
    )
    return cast(Kernel, jit(function))


def inlined(function: Kernel) -> Kernel:
    """Compile a helper that kernels call; LLVM inlines it."""
    return cast(Kernel, numba.njit(fastmath=_FAST_MATH, nogil=True, error_model="numpy")(function))

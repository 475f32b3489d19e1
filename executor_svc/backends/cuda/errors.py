"""What an error of CUDA's means for this process, whichever library raises it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from cupy_kernels.errors import KernelError, LaunchError
from executor_svc.runner import FatalDeviceError

_LIBRARIES: Final = ("cupy", "cupy_backends")  # not imported where there is no GPU
# torch raises plain RuntimeErrors for cuBLAS, and while CUDA is set up.
_BEGINNINGS: Final = ("CUDA ", "No CUDA GPUs", "Unexpected error from cuda")
_SHORTAGES: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns what a broken CUDA context raises into FatalDeviceError.

    After an illegal address, say, every later call of the process fails; only a new one helps. Want
    of memory is not among them.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (torch.AcceleratorError, KernelError) as error:
        raise FatalDeviceError(first_line(error)) from error


def is_of_device(error: Exception) -> bool:
    """Whether CUDA failed, and not a mistake of ours."""
    return (
        isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | LaunchError)
        or type(error).__module__.partition(".")[0] in _LIBRARIES
        or str(error).startswith(_BEGINNINGS)
    )


def is_shortage(error: Exception) -> bool:
    """Whether CUDA failed for want of memory on the device."""
    return is_of_device(error) and (
        isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in _SHORTAGES)
    )


def first_line(error: Exception) -> str:
    """What it says, without advice on debugging."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Which errors mean that the device is lost to this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cupy_kernels.errors import KernelError
from executor_svc.runner import FatalDeviceError


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
        raise FatalDeviceError(str(error).splitlines()[0]) from error

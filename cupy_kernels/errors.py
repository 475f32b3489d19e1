"""What can be missing or too old. Every message says what to do."""

from __future__ import annotations


class KernelError(Exception):
    """The kernels cannot run here."""


class MissingLibraryError(KernelError):
    """CuPy or NVRTC is not installed."""


class NoGpuError(KernelError):
    """There is no NVIDIA driver or no device of that number."""


class DriverTooOldError(KernelError):
    """The driver does not support the CUDA version that the kernels are built with."""


class GpuTooOldError(KernelError):
    """The GPU lacks instructions that the kernels use."""


class UnsupportedShapeError(KernelError):
    """A model's shape, element type or block size that the kernels do not do."""


class CompileError(KernelError):
    """NVRTC refused a source; the message is its log."""


class LaunchError(KernelError):
    """The driver refused a launch, as it does after any error that broke the context."""

"""One GPU: what it is, and the kernels loaded on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from cupy_kernels.cubins import CubinCache, default_folder, target_of
from cupy_kernels.errors import DriverTooOldError, MissingLibraryError, NoGpuError
from cupy_kernels.launch import Kernel
from cupy_kernels.nvrtc import CUDA_MAJOR
from cupy_kernels.source import Variant

_HOPPER: Final = (9, 0)
# Without an opt-in, static and dynamic shared memory together may take this much.
_PLAIN_SHARED_BYTES: Final = 48 << 10


@dataclass(slots=True)
class Device:
    """A CUDA device and the kernels loaded on it."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    num_sms: int
    max_shared_bytes: int  # per block of threads
    cache: CubinCache
    _cupy: Any
    _loaded: dict[tuple[str, int], Kernel] = field(default_factory=dict)

    @classmethod
    def open(cls, ordinal: int = 0, cache_folder: Path | None = None) -> Self:
        """Look at a device. Raises a KernelError that says what is missing or too old."""
        cupy = import_cupy()
        check_driver(cupy.cuda.runtime.driverGetVersion())
        try:
            count = cupy.cuda.runtime.getDeviceCount()
            if not 0 <= ordinal < count:
                raise NoGpuError(f"there is no CUDA device {ordinal}; the driver shows {count}")
            found = cupy.cuda.runtime.getDeviceProperties(ordinal)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise NoGpuError(f"the driver shows no usable device: {error}") from error
        capability = (found["major"], found["minor"])
        target_of(capability)
        return cls(
            ordinal=ordinal,
            name=found["name"].decode(),
            capability=capability,
            num_sms=found["multiProcessorCount"],
            max_shared_bytes=found["sharedMemPerBlockOptin"],
            cache=CubinCache(cache_folder or default_folder()),
            _cupy=cupy,
        )

    def load(self, variant: Variant, shared_bytes: int = 0) -> Kernel:
        """The kernel of a variant, compiled and loaded the first time.

        Must happen before a graph is captured. `shared_bytes` is the dynamic shared memory that
        launches will ask for. Raises CompileError or MissingLibraryError.
        """
        key = (variant.text(), shared_bytes)
        if key not in self._loaded:
            self._loaded[key] = self._load(variant, shared_bytes)
        return self._loaded[key]

    def _load(self, variant: Variant, shared_bytes: int) -> Kernel:
        path = self.cache.get(variant, target_of(self.capability))
        with self._cupy.cuda.Device(self.ordinal):
            module = self._cupy.RawModule(path=str(path))
            function = module.get_function(variant.name)
            # Past the plain limit the driver wants to be asked first; static memory counts too.
            if shared_bytes > _PLAIN_SHARED_BYTES // 2:
                function.max_dynamic_shared_size_bytes = shared_bytes
            address = function.kernel.ptr
        return Kernel(variant.name, address, variant.params_dtype(), self.is_hopper, module)

    @property
    def is_hopper(self) -> bool:
        """Hopper or newer: launches overlap, blocks of threads can run in clusters."""
        return self.capability >= _HOPPER


def import_cupy() -> Any:
    """The cupy module. Raises MissingLibraryError."""
    try:
        import cupy
    except ImportError as error:
        raise MissingLibraryError(
            f"CuPy cannot be imported ({error}): pip install 'blockyard[cuda]'"
        ) from error
    return cupy


def check_driver(version: int) -> None:
    """Raises NoGpuError for version 0, DriverTooOldError for one such as 12080 (CUDA 12.8)."""
    if version == 0:
        raise NoGpuError("no NVIDIA driver is loaded")
    if version < CUDA_MAJOR * 1000:
        have = f"{version // 1000}.{version % 1000 // 10}"
        raise DriverTooOldError(
            f"the driver supports CUDA up to {have}; the kernels need CUDA {CUDA_MAJOR} "
            "(driver 580 or newer)"
        )

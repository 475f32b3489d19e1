"""Launches with everything packed beforehand, through the driver's cuLaunchKernelEx.

The host pays for a launch what ctypes and the driver cost, under half of RawKernel.__call__, and on
compute capability 9.0 and newer a kernel's launch overlaps the end of the one before it
(programmatic dependent launch): all kernels here begin with wait_for_predecessor.
Reference: https://docs.nvidia.com/cuda/cuda-driver-api, CUlaunchConfig.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from cupy_kernels.errors import LaunchError

# CUlaunchAttributeID.
_CLUSTER_DIMENSION: Final = 4
_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6
_OUT_OF_MEMORY: Final = 2


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int * 16),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver_launch() -> Any:
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded function; `module` keeps it loaded."""

    name: str
    function: int
    params_dtype: np.dtype[np.void]
    is_hopper: bool  # or newer: overlaps the end of the kernel before it, can run in clusters
    module: Any


class Launch:
    """A kernel, its grid and its parameters, ready to go any number of times.

    The parameters hold device addresses: whoever made the launch keeps that memory alive.
    """

    __slots__ = (
        "_attributes",
        "_cluster",
        "_config",
        "_driver_arguments",
        "_grid",
        "_kernel",
        "_num_attributes",
        "_params",
        "_pointers",
        "_sizes",
        "_stream",
    )

    def __init__(
        self,
        kernel: Kernel,
        blocks: int,
        threads: int,
        params: Mapping[str, float],
        shared_bytes: int = 0,
    ) -> None:
        """Pack `params`, one value for each field of the kernel's struct."""
        assert set(params) == set(kernel.params_dtype.names or ()), (kernel.name, sorted(params))
        self._params: npt.NDArray[np.void] = np.zeros(1, kernel.params_dtype)
        for name, value in params.items():
            self._params[name] = value
        self._pointers = (ctypes.c_void_p * 1)(self._params.ctypes.data)
        self._attributes = (_Attribute * 2)(
            _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,)),
            _Attribute(id=_CLUSTER_DIMENSION, value=(1, 1, 1)),
        )
        self._config = _Config(
            grid=(blocks, 1, 1),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=self._attributes,
        )
        # Windows into the structs: numpy and ctypes arrays cost ten times as much to write to.
        self._grid = ctypes.c_uint.from_buffer(self._config, _Config.grid.offset)
        self._num_attributes = ctypes.c_uint.from_buffer(
            self._config, _Config.num_attributes.offset
        )
        cluster_offset = ctypes.sizeof(_Attribute) + _Attribute.value.offset
        self._cluster = ctypes.c_int.from_buffer(self._attributes, cluster_offset)
        self._stream = ctypes.c_void_p.from_buffer(self._config, _Config.stream.offset)
        self._sizes: dict[str, Any] = {}  # of the parameters that `resize` changes
        self._kernel = kernel
        self._driver_arguments = (
            ctypes.addressof(self._config),
            kernel.function,
            ctypes.addressof(self._pointers),
            None,
        )
        self.resize(blocks)

    def resize(self, blocks: int, *, cluster_size: int = 1, **params: float) -> Self:
        """Change the grid and some parameters of launches from here on; returns the launch.

        With a cluster size above 1, from compute capability 9.0 on, so many neighbouring blocks
        run together and reach each other's shared memory; it divides the grid.
        """
        assert blocks > 0, f"{self._kernel.name}: nothing to launch"
        assert cluster_size == 1 or self._kernel.is_hopper, self._kernel.name
        assert blocks % cluster_size == 0, (blocks, cluster_size)
        self._grid.value = blocks
        self._cluster.value = cluster_size
        self._num_attributes.value = self._kernel.is_hopper + (cluster_size > 1)
        for name, value in params.items():
            self._size(name).value = value
        return self

    def resize_as(self, other: Self) -> Self:
        """As another launch of the same kernel was resized; returns the launch."""
        self._grid.value = other._grid.value
        self._cluster.value = other._cluster.value
        self._num_attributes.value = other._num_attributes.value
        for name, size in other._sizes.items():
            self._size(name).value = size.value
        return self

    def _size(self, name: str) -> Any:
        size = self._sizes.get(name)
        if size is None:
            dtype, offset = self._kernel.params_dtype.fields[name][:2]  # type: ignore[index]
            number = np.ctypeslib.as_ctypes_type(dtype)
            size = number.from_address(self._params.ctypes.data + offset)
            self._sizes[name] = size
        return size

    def run(self, stream: int) -> None:
        """Enqueue on a stream, given by its raw handle; the caller's thread has its context.

        Raises LaunchError if the driver refuses. Errors in the kernel appear later.
        """
        self._stream.value = stream
        if status := _driver_launch()(*self._driver_arguments):
            reason = "out of memory" if status == _OUT_OF_MEMORY else f"CUDA driver error {status}"
            raise LaunchError(f"{self._kernel.name} cannot be launched: {reason}")

"""What stands between matrix products: norms fused with the residual stream, the activation."""

from __future__ import annotations

from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import ElementType
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address

_VECTOR: Final = 8  # elements in 16 bytes
_MAX_THREADS: Final = 1024
_VECTORS_PER_THREAD: Final = 2
_SILU_THREADS: Final = 256

MAX_HIDDEN: Final = _VECTOR * _VECTORS_PER_THREAD * _MAX_THREADS


def glue_variants(element: ElementType) -> dict[str, Variant]:
    """The kernels by name."""
    defines = {"ELEMENT_BF16": int(element == "bfloat16")}
    return {name: Variant(name, defines) for name in ("add_rms_norm", "silu_mul")}


class AddRmsNorm:
    """Launches of sources/add_rms_norm.cu."""

    def __init__(self, device: Device, element: ElementType, rms_norm_eps: float) -> None:
        """Load the kernel."""
        self._element = element
        self._eps = rms_norm_eps
        self._kernel = device.load(glue_variants(element)["add_rms_norm"])

    def pack(
        self,
        *,
        residual: DeviceTensor,
        delta: DeviceTensor | None,
        weight: DeviceTensor,
        out: DeviceTensor,
    ) -> Launch:
        """Add delta to residual in place, if given; out is the RMS norm of the rounded sum.

        Args:
            residual: [num_tokens, hidden]; hidden is a multiple of 8, at most MAX_HIDDEN.
            delta: [num_tokens, hidden] or None.
            weight: [hidden].
            out: [num_tokens, hidden].
        """
        num_tokens, hidden = residual.shape
        assert hidden % _VECTOR == 0, hidden
        assert hidden <= MAX_HIDDEN, hidden
        size = (num_tokens, hidden)
        params = {
            "residual": address(residual, self._element, *size),
            "delta": 0 if delta is None else address(delta, self._element, *size),
            "weight": address(weight, self._element, hidden),
            "out": address(out, self._element, *size),
            "hidden": hidden,
            "eps": self._eps,
        }
        warps = -(-hidden // (_VECTOR * 32))
        return Launch(self._kernel, num_tokens, min(_MAX_THREADS, 32 * warps), params)

    def resize(self, launch: Launch, num_tokens: int) -> Launch:
        """The launch for another number of tokens, at most those that it was packed for."""
        return launch.resize(num_tokens)


class SiluMul:
    """Launches of sources/silu_mul.cu."""

    def __init__(self, device: Device, element: ElementType) -> None:
        """Load the kernel."""
        self._element = element
        self._kernel = device.load(glue_variants(element)["silu_mul"])

    def pack(self, *, gate_up: DeviceTensor, out: DeviceTensor) -> Launch:
        """silu(gate) * up.

        Args:
            gate_up: [num_tokens, 2 * intermediate], gate first; intermediate is a multiple of 8.
            out: [num_tokens, intermediate].
        """
        num_tokens, intermediate = out.shape
        assert intermediate % _VECTOR == 0, intermediate
        params = {
            "gate_up": address(gate_up, self._element, num_tokens, 2 * intermediate),
            "out": address(out, self._element, num_tokens, intermediate),
            "num_tokens": num_tokens,
            "intermediate": intermediate,
        }
        blocks = self._blocks(num_tokens, intermediate)
        return Launch(self._kernel, blocks, _SILU_THREADS, params)

    def resize(self, launch: Launch, num_tokens: int, intermediate: int) -> Launch:
        """The launch for another number of tokens, at most those that it was packed for."""
        return launch.resize(self._blocks(num_tokens, intermediate), num_tokens=num_tokens)

    def _blocks(self, num_tokens: int, intermediate: int) -> int:
        return -(-num_tokens * intermediate // (_VECTOR * _SILU_THREADS))

"""What launchers ask of device memory: torch tensors have it. Checks are for our own mistakes."""

from __future__ import annotations

from typing import Any, Protocol


class DeviceTensor(Protocol):
    """Contiguous memory on the device with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""

    @property
    def dtype(self) -> Any:
        """Prints as torch.float32 or float32."""

    @property
    def is_cuda(self) -> bool:
        """Whether the memory is the device's."""

    def is_contiguous(self) -> bool:
        """Whether elements lie in row-major order without gaps."""

    def data_ptr(self) -> int:
        """Device address of the first element."""


def address(tensor: DeviceTensor, dtype: str, *shape: int | None) -> int:
    """The tensor's address, once its type, shape (None: any) and contiguity are as expected."""
    actual = str(tensor.dtype).removeprefix("torch.")
    assert actual == dtype, f"expected {dtype}, got {actual}"
    assert len(tensor.shape) == len(shape), f"expected shape {shape}, got {tuple(tensor.shape)}"
    for want, have in zip(shape, tensor.shape, strict=True):
        assert want is None or want == have, f"expected shape {shape}, got {tuple(tensor.shape)}"
    assert tensor.is_cuda, "expected device memory"
    assert tensor.is_contiguous(), "expected contiguous memory"
    return tensor.data_ptr()

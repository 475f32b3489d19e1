"""Everything here is marked `gpu`, and skipped with the reason where no device can be used."""

from __future__ import annotations

import functools
import pathlib

import pytest

from cupy_kernels.device import Device
from cupy_kernels.errors import KernelError


@functools.cache
def missing() -> str:
    """Why there is no device; empty if there is one."""
    try:
        Device.open()
        import torch
    except (KernelError, ImportError) as error:
        return str(error)
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if reason := missing():
                item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


@pytest.fixture(scope="session")
def device() -> Device:
    return Device.open()

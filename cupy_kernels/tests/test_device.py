"""What is missing or too old is named; launches check what they pack."""

from __future__ import annotations

import ast
import ctypes
import pathlib
import sys
from dataclasses import dataclass

import numpy as np
import pytest

import cupy_kernels
from cupy_kernels import launch
from cupy_kernels.device import check_driver, import_cupy
from cupy_kernels.errors import (
    DriverTooOldError,
    LaunchError,
    MissingLibraryError,
    NoGpuError,
)
from cupy_kernels.launch import Kernel, Launch
from cupy_kernels.sample import cluster_size
from cupy_kernels.tensors import address


def test_without_cupy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'blockyard\[cuda\]'"):
        import_cupy()


def test_without_a_driver_there_is_no_gpu() -> None:
    with pytest.raises(NoGpuError, match="no NVIDIA driver"):
        check_driver(0)


def test_an_old_driver_is_named() -> None:
    with pytest.raises(DriverTooOldError, match=r"CUDA up to 12\.8; .*driver 580"):
        check_driver(12080)


def test_a_new_driver_will_do() -> None:
    check_driver(13000)
    check_driver(14020)


KERNEL = Kernel("tiny", 0, np.dtype([("out", np.uint64), ("n", np.int32)], align=True), False, None)


def test_a_launch_needs_all_parameters_and_no_others() -> None:
    for params in ({"out": 1}, {"out": 1, "n": 2, "m": 3}):
        with pytest.raises(AssertionError, match="tiny"):
            Launch(KERNEL, 1, 32, params)


def test_a_launch_needs_work() -> None:
    with pytest.raises(AssertionError, match="nothing to launch"):
        Launch(KERNEL, 0, 32, {"out": 1, "n": 2})


class FakeDriver:
    """cuLaunchKernelEx; notes (blocks, stream, out, n) of each launch as the driver reads it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int]] = []
        self.status = 0

    def __call__(self, config: int, function: int, pointers: int, extra: None) -> int:
        settings = launch._Config.from_address(config)
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        dtype = KERNEL.params_dtype
        params = np.frombuffer(ctypes.string_at(address, dtype.itemsize), dtype)[0]
        self.seen.append(
            (settings.grid[0], settings.stream, params["out"].item(), params["n"].item())
        )
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(launch, "_driver_launch", lambda: driver)
    return driver


def test_the_driver_gets_the_newest_sizes(driver: FakeDriver) -> None:
    first = Launch(KERNEL, 1, 32, {"out": 1 << 40, "n": 2})
    other = Launch(KERNEL, 1, 32, {"out": 5 << 40, "n": 2})
    first.run(7)
    first.resize(9, n=1000).run(8)
    first.resize(10, n=-1, out=3 << 41).run(8)
    first.resize(4, n=20)
    other.resize_as(first.resize(4, out=6)).run(8)
    assert driver.seen == [
        (1, 7, 1 << 40, 2),
        (9, 8, 1 << 40, 1000),
        (10, 8, 3 << 41, -1),
        (4, 8, 6, 20),
    ]


HOPPER = Kernel("tiny", 0, KERNEL.params_dtype, is_hopper=True, module=None)


def attributes_of(packed: Launch) -> list[tuple[int, list[int]]]:
    """Id and first three values of the attributes that the driver would read."""
    config = packed._config
    return [
        (config.attributes[i].id, list(config.attributes[i].value)[:3])
        for i in range(config.num_attributes)
    ]


def test_a_cluster_is_one_attribute_more() -> None:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6, _CLUSTER_DIMENSION 4."""
    first, other = (Launch(HOPPER, 1, 32, {"out": 1, "n": 2}) for _ in range(2))
    overlap = (6, [1, 0, 0])
    assert attributes_of(first) == [overlap]
    assert attributes_of(first.resize(16, cluster_size=8)) == [overlap, (4, [8, 1, 1])]
    assert attributes_of(other.resize_as(first)) == [overlap, (4, [8, 1, 1])]
    assert attributes_of(first.resize(16)) == [overlap]
    assert ctypes.sizeof(launch._Attribute) == 72
    assert attributes_of(Launch(KERNEL, 1, 32, {"out": 1, "n": 2})) == []


def test_a_cluster_must_divide_the_grid_and_needs_hopper() -> None:
    with pytest.raises(AssertionError, match="12, 8"):
        Launch(HOPPER, 1, 32, {"out": 1, "n": 2}).resize(12, cluster_size=8)
    with pytest.raises(AssertionError, match="tiny"):
        Launch(KERNEL, 1, 32, {"out": 1, "n": 2}).resize(8, cluster_size=8)


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 8), (16, 8), (17, 4), (33, 4), (34, 2), (66, 2), (132, 2), (133, 1), (512, 1)],
)
def test_rows_share_the_sms_among_them(num_rows: int, expected: int) -> None:
    assert cluster_size(num_rows, 132) == expected
    assert cluster_size(num_rows, 0) == 1


def test_launches_of_one_kernel_take_each_others_sizes_and_nothing_else(driver: FakeDriver) -> None:
    first, other = (Launch(KERNEL, 1, 32, {"out": out, "n": 2}) for out in (11, 22))
    other.resize_as(first.resize(5, n=3)).run(1)
    assert driver.seen == [(5, 1, 22, 3)]
    with pytest.raises(AssertionError, match="nothing to launch"):
        first.resize(0)


@pytest.mark.parametrize(("status", "reason"), [(2, "out of memory"), (719, "driver error 719")])
def test_a_refused_launch_says_why(driver: FakeDriver, status: int, reason: str) -> None:
    driver.status = status
    with pytest.raises(LaunchError, match=f"tiny cannot be launched: .*{reason}"):
        Launch(KERNEL, 1, 32, {"out": 1, "n": 2}).run(0)


@dataclass
class FakeTensor:
    shape: tuple[int, ...] = (3, 4)
    dtype: str = "torch.bfloat16"
    is_cuda: bool = True
    is_packed: bool = True

    def is_contiguous(self) -> bool:
        return self.is_packed

    def data_ptr(self) -> int:
        return 4096


def test_tensors_are_checked_before_their_address_is_taken() -> None:
    assert address(FakeTensor(), "bfloat16", 3, None) == 4096
    for tensor, message in (
        (FakeTensor(dtype="torch.float16"), "expected bfloat16, got float16"),
        (FakeTensor(shape=(3, 4, 1)), r"got \(3, 4, 1\)"),
        (FakeTensor(shape=(4, 4)), r"got \(4, 4\)"),
        (FakeTensor(is_cuda=False), "device memory"),
        (FakeTensor(is_packed=False), "contiguous"),
    ):
        with pytest.raises(AssertionError, match=message):
            address(tensor, "bfloat16", 3, None)


def test_the_package_imports_nothing_but_cupy_and_numpy() -> None:
    root = pathlib.Path(cupy_kernels.__file__).parent
    names = set()
    for path in root.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"cupy", "cupy_kernels", "numpy"}

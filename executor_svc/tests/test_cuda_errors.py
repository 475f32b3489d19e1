"""What becomes of CUDA's errors at start: one line, and the exit code that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cupy_kernels.device import Device
from cupy_kernels.errors import LaunchError, NoGpuError
from executor_svc import __main__ as executor
from executor_svc.backends.cuda import host_memory, loading
from executor_svc.backends.cuda.host_memory import HostBlocks
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.backends.cuda.runner import warm_up_sizes
from executor_svc.kv_pool import KvPoolError
from executor_svc.runner import FatalDeviceError
from executor_svc.tests.models import tiny_config, write_model


class CUDARuntimeError(RuntimeError):
    """CuPy's, which is not installed without a GPU."""


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"

ADVICE = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
    LaunchError("decode cannot be launched: out of memory"),
]
LOSSES = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + ADVICE),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
    CUDARuntimeError("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy"),
    LaunchError("decode cannot be launched: CUDA driver error 719"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    config = tiny_config(hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    write_model(path, config)
    return path


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "open", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 2 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 29)


def failing(error: Exception) -> Any:
    def load(self: Any, progress: object) -> None:
        self.stage = "the weights"
        raise error

    return load


OPTIONS = CudaOptions(block_size=16, max_rows=8, max_num_batched_tokens=64, max_model_len=None)


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("error", SHORTAGES)
def test_want_of_memory_says_what_did_not_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(loading._Loader, "load", failing(error))
    with pytest.raises(KvPoolError, match=r"does not hold the weights: 512 MiB.*--kv-memory"):
        load_runner(model, OPTIONS, lambda _stage, _done: None)


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("error", LOSSES)
def test_other_failures_of_cuda_lose_the_device(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(loading._Loader, "load", failing(error))
    with pytest.raises(FatalDeviceError) as lost:
        load_runner(model, OPTIONS, lambda _stage, _done: None)
    assert str(lost.value) == f"CUDA failed at the weights: {str(error).splitlines()[0]}"


@pytest.mark.usefixtures("no_gpu_needed")
def test_our_own_mistakes_are_not_called_cudas(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    monkeypatch.setattr(loading._Loader, "load", failing(mistake))
    with pytest.raises(RuntimeError, match="size of tensor"):
        load_runner(model, OPTIONS, lambda _stage, _done: None)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FatalDeviceError("CUDA failed at the weights: x"), 1, "device lost: CUDA failed at"),
        (KvPoolError("the GPU's memory does not hold"), 2, "does not hold"),
        (NoGpuError("the driver shows no usable device"), 2, "no usable device"),
    ],
)
def test_the_process_ends_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(executor, "load_runner", load)
    arguments = ["--listen", f"unix:{tmp_path}/x.sock", "--model-dir", str(tmp_path)]
    assert executor.main(arguments) == code
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said


class FakeRuntime:
    """cupy.cuda.runtime, as far as locking needs it."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, *, can_lock: bool = True) -> None:
        self.can_lock = can_lock
        self.locked: dict[int, int] = {}
        self.cuda = self
        self.runtime = self

    def hostRegister(self, address: int, size: int, flags: int) -> None:
        if not self.can_lock:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.locked[address] = size

    def hostUnregister(self, address: int) -> None:
        del self.locked[address]

    def deviceSynchronize(self) -> None:
        pass


def test_host_blocks_are_locked_while_somebody_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(host_memory, "import_cupy", lambda: runtime)
    host = HostBlocks(3, 5000)
    assert host.blocks.shape == (3, 5000)
    assert not host.blocks.any()
    host.blocks[2] = 7
    assert runtime.locked == {host.blocks.data_ptr(): 15_000}
    del host
    assert not runtime.locked


def test_no_host_blocks_need_no_gpu() -> None:
    assert HostBlocks(0, 4096).blocks.shape == (0, 4096)


def test_memory_that_cannot_be_locked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "import_cupy", lambda: FakeRuntime(can_lock=False))
    with pytest.raises(KvPoolError, match=r"0\.0 GiB of host memory cannot be locked .*ulimit -l"):
        HostBlocks(2, 4096)


@pytest.mark.parametrize(
    ("max_tokens", "max_rows", "expected"),
    [(8192, 512, [8192, 4096, 2048, 1024, 512]), (512, 512, [512]), (700, 300, [700, 350, 300])],
)
def test_a_warm_up_halves_steps_down_to_what_graphs_do(
    max_tokens: int, max_rows: int, expected: list[int]
) -> None:
    assert warm_up_sizes(max_tokens, max_rows) == expected

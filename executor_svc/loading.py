"""Bringing up the runner that the settings ask for: on a GPU, or on the CPU.

What needs torch is imported late: it takes seconds to load, and what is wrong with the settings is
told first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from blockyard.common import model_dir
from cupy_kernels.device import Device
from cupy_kernels.errors import MissingLibraryError, NoGpuError
from executor_svc.config import ExecutorSettings
from executor_svc.main_memory import check_can_lock, check_pools_fit
from executor_svc.model.config import parse_config
from executor_svc.model.errors import ModelError
from executor_svc.runner import Runner

_CPU_KV_BYTES: Final = 1 << 30
_CPU_MAX_ROWS: Final = 64
_GPU_MAX_ROWS: Final = 512
_GPU_BATCHED_TOKENS: Final = 8192
_CPU_KV_ELEMENT_BYTES: Final = 4

Progress = Callable[[str, float], None]

log = logging.getLogger(__name__)


def load_runner(settings: ExecutorSettings, progress: Progress) -> Runner:
    """Load the model and allocate all memory.

    Args:
        settings: sizes that are not set get the device's defaults.
        progress: told (stage, fraction done).

    Raises:
        ModelDirError: the directory is not one of ours or lacks files.
        ModelError: the model is not supported, or its weights do not match it.
        KernelError: the GPU cannot be used, or not for this model.
        KvPoolError: the memory holds no usable pool.
        FatalDeviceError: the GPU failed; a new process may do better.
    """
    config = parse_config(model_dir.load(settings.model_dir).config)
    if wants_gpu(settings.device):
        check_can_lock(settings.host_memory)
        return _load_gpu(settings, progress)
    if settings.load_format == "dummy":
        raise ModelError("random weights (--load-format dummy) are for GPUs")
    kv_memory = settings.kv_memory or _CPU_KV_BYTES
    check_pools_fit(kv_memory, settings.host_memory)
    block_bytes = config.kv_elements_per_token * _CPU_KV_ELEMENT_BYTES * settings.block_size
    from executor_svc.model_runner import ModelRunner

    return ModelRunner.load(
        settings.model_dir,
        kv_memory_bytes=kv_memory,
        block_size=settings.block_size,
        max_rows=settings.max_rows or _CPU_MAX_ROWS,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        num_threads=settings.num_threads,
        num_host_blocks=settings.host_memory // block_bytes,
        progress=progress,
    )


def wants_gpu(device: str) -> bool:
    """Whether to run on a GPU: if told so, or if `auto` finds one.

    Raises KernelError, with `cuda` for whatever is missing, with `auto` if there is a GPU that
    cannot be used.
    """
    if device == "cpu":
        return False
    try:
        found = Device.open()
    except (MissingLibraryError, NoGpuError) as error:
        if device == "cuda":
            raise
        log.info("no GPU is used: %s", error)
        return False
    log.info("the GPU is %s, compute capability %d.%d", found.name, *found.capability)
    return True


def _load_gpu(settings: ExecutorSettings, progress: Progress) -> Runner:
    import torch

    if not torch.cuda.is_available():
        raise NoGpuError(f"torch {torch.__version__} cannot use the GPU: install its CUDA build")
    from executor_svc.backends.cuda import loading

    options = loading.CudaOptions(
        block_size=settings.block_size,
        max_rows=settings.max_rows or _GPU_MAX_ROWS,
        max_num_batched_tokens=settings.max_num_batched_tokens or _GPU_BATCHED_TOKENS,
        max_model_len=settings.max_model_len,
        kv_memory_bytes=settings.kv_memory,
        host_memory_bytes=settings.host_memory,
        memory_utilization=settings.gpu_memory_utilization,
        is_dummy=settings.load_format == "dummy",
        element=settings.dtype,
    )
    return loading.load_runner(settings.model_dir, options, progress)

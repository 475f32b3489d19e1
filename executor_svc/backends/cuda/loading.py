"""Bringing a model up on a GPU: weights, buffers, pools, graphs, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from blockyard.common import model_dir as model_dirs
from blockyard.common.model_dir import ModelDir
from cupy_kernels.device import Device
from cupy_kernels.shape import AttentionShape, ElementType
from executor_svc.backends.cuda.backend import CudaBackend, StepSizes, attention_shape
from executor_svc.backends.cuda.kv_pool import CudaKvPool, staging_blocks
from executor_svc.backends.cuda.runner import CudaRunner
from executor_svc.kv_pool import KvPool, KvPoolError
from executor_svc.model.config import ModelConfig, model_len, parse_config
from executor_svc.model.llama import LlamaModel, load_llama
from executor_svc.model.weights import DummyWeights, Weights
from executor_svc.runner import RunnerInfo

_MIB: Final = 1 << 20
_MAX_SLOTS: Final = 2**31 - 1  # slots are numbered in 32 bits

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What to bring up.

    Attributes:
        block_size: tokens per KV block.
        max_rows: rows resident at once.
        max_num_batched_tokens: most tokens in one step.
        max_model_len: longest sequence; None: what the model's positions allow.
        kv_memory_bytes: of the device pool, padding block included; None: what is left of
            memory_utilization.
        host_memory_bytes: of the host pool.
        memory_utilization: share of the device's memory that this process may take.
        is_dummy: random weights.
        element: of weights, activations and KV.
    """

    block_size: int
    max_rows: int
    max_num_batched_tokens: int
    max_model_len: int | None
    kv_memory_bytes: int | None = None
    host_memory_bytes: int = 0
    memory_utilization: float = 0.97
    is_dummy: bool = False
    element: ElementType = "bfloat16"


def load_runner(model_dir: Path, options: CudaOptions, progress: Progress) -> CudaRunner:
    """Load a model directory onto device 0, allocate all memory, capture the graphs.

    Args:
        model_dir: as `blockyard models import` writes it.
        options: see there.
        progress: told (stage, fraction done).

    Raises:
        ModelDirError: the directory is not one of ours or lacks files.
        ModelError: the model is not supported, or its weights do not match it.
        KernelError: no usable GPU, driver or library, or a shape that the kernels do not do.
        KvPoolError: the memory holds no model, or no usable pool beside it.
    """
    directory = model_dirs.load(model_dir)
    config = parse_config(directory.config)
    shape = attention_shape(config, options.block_size, options.element)
    device = Device.open()
    torch.cuda.set_device(device.ordinal)
    loader = _Loader(directory, config, shape, options, device)
    try:
        return loader.load(progress)
    except torch.OutOfMemoryError as error:
        raise KvPoolError(loader.explain_shortage()) from error


class _Loader:
    def __init__(
        self,
        directory: ModelDir,
        config: ModelConfig,
        shape: AttentionShape,
        options: CudaOptions,
        device: Device,
    ) -> None:
        self._directory = directory
        self._config = config
        self._shape = shape
        self._options = options
        self._device = device
        self._stage = ""

    def load(self, progress: Progress) -> CudaRunner:
        options = self._options
        max_model_len = model_len(self._config, options.max_model_len)
        self._stage = "kernels and the step's buffers"
        progress("loading kernels", 0.0)
        sizes = StepSizes(
            max_tokens=max(options.max_num_batched_tokens, options.max_rows),
            max_rows=options.max_rows,
            max_model_len=max_model_len,
            max_blocks_per_row=-(-max_model_len // options.block_size),
        )
        backend = CudaBackend(self._device, self._config, self._shape, sizes)
        self._stage = "the weights"
        model = self._load_model(backend, partial(progress, "loading weights"))
        self._stage = "the KV pool"
        progress("allocating blocks", 0.0)
        pool, num_blocks = self._allocate(backend)
        info = RunnerInfo(
            model_digest=self._directory.digest,
            model_name=self._directory.name,
            vocab_size=self._config.vocab_size,
            max_model_len=max_model_len,
            block_size=options.block_size,
            num_device_blocks=num_blocks,
            num_host_blocks=len(pool.host),
            max_rows=options.max_rows,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_bytes=self._shape.block_bytes,
            device=f"{self._device.name} ({options.element})",
            swap_bytes_per_s=pool.measure_swap_rate(),
        )
        self._stage = "the graphs"
        runner = CudaRunner(info, self._device, model, backend, pool)
        runner.warm_up(partial(progress, "capturing graphs"))
        progress("ready", 1.0)
        return runner

    def _load_model(self, backend: CudaBackend, progress: Callable[[float], None]) -> LlamaModel:
        with torch.inference_mode():
            if self._options.is_dummy:
                weights = DummyWeights(backend.torch_device)
                return load_llama(self._config, weights, backend, progress)
            with Weights(self._directory.weight_files) as stored:
                return load_llama(self._config, stored, backend, progress)

    def _allocate(self, backend: CudaBackend) -> tuple[CudaKvPool, int]:
        options, block_bytes = self._options, self._shape.block_bytes
        num_host_blocks = options.host_memory_bytes // block_bytes
        budget = options.kv_memory_bytes
        if budget is None:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            staging = 2 * staging_blocks(block_bytes) * block_bytes if num_host_blocks else 0
            budget = int(free - total * (1 - options.memory_utilization)) - staging
        most = _MAX_SLOTS // options.block_size
        num_blocks = min(KvPool.num_blocks(max(0, budget), block_bytes), most)
        pool = CudaKvPool(self._device, backend.stream, num_blocks, num_host_blocks, block_bytes)
        backend.use_pool(pool.blocks)
        return pool, num_blocks

    def explain_shortage(self) -> str:
        """For people: what was needed, what there is, what to change."""
        free, total = (size // _MIB for size in torch.cuda.mem_get_info())
        used = torch.cuda.memory_allocated() // _MIB
        return (
            f"the GPU's memory does not hold {self._stage}: {used} MiB are taken by this process, "
            f"{free} of {total} MiB are free; choose a smaller model, --kv-memory, "
            "--max-num-batched-tokens or --max-num-seqs, or end what else uses the GPU"
        )

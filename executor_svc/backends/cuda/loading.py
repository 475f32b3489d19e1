"""A model on a GPU: buffers, weights, host pool, a warm-up, the KV pool of what is left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from blockyard.common import logs
from blockyard.common import model_dir as model_dirs
from blockyard.common.model_dir import ModelDir
from cupy_kernels.device import Device
from cupy_kernels.errors import LaunchError
from cupy_kernels.shape import AttentionShape, ElementType
from executor_svc.backends.cuda.backend import CudaBackend, StepSizes, attention_shape
from executor_svc.backends.cuda.errors import first_line, is_of_device, is_shortage
from executor_svc.backends.cuda.host_memory import HostBlocks
from executor_svc.backends.cuda.kv_pool import CudaKvPool, num_staging_blocks
from executor_svc.backends.cuda.limits import check_sizes
from executor_svc.backends.cuda.runner import CudaRunner
from executor_svc.kv_pool import KvPool, KvPoolError
from executor_svc.model.config import ModelConfig, model_len, parse_config
from executor_svc.model.llama import LlamaModel, load_llama
from executor_svc.model.weights import DummyWeights, Weights
from executor_svc.runner import FatalDeviceError, RunnerInfo

_MIB: Final = 1 << 20
_MAX_SLOTS: Final = 2**31 - 1  # slots are numbered in 32 bits
_WARM_UP_BLOCKS: Final = 2  # the fewest: steps of a warm-up use the padding block alone
_RESERVE_BYTES: Final = 256 * _MIB
"""Left free at least: libraries may load a kernel that the warm-up did not meet."""

Progress = Callable[[str, float], None]

log = logging.getLogger(__name__)


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
        FatalDeviceError: CUDA failed otherwise; a new process may do better.
    """
    directory = model_dirs.load(model_dir)
    config = parse_config(directory.config)
    shape = attention_shape(config, options.block_size, options.element)
    check_sizes(config, options.max_rows, options.max_num_batched_tokens)
    loader = _Loader(directory, config, shape, options, Device.open())
    try:
        return loader.load(progress)
    except (RuntimeError, LaunchError) as error:
        if is_shortage(error):
            raise KvPoolError(loader.explain_shortage()) from error
        if is_of_device(error):
            message = f"CUDA failed at {loader.stage}: {first_line(error)}"
            raise FatalDeviceError(message) from error
        raise


def _sum_in_float32() -> None:
    """Else parts of a long sum may be rounded to 16 bits before they are added.

    That is less exact, and differs between numbers of tokens.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


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
        max_model_len = model_len(config, options.max_model_len)
        self._sizes = StepSizes(
            max_tokens=max(options.max_num_batched_tokens, options.max_rows),
            max_rows=options.max_rows,
            max_model_len=max_model_len,
            max_blocks_per_row=-(-max_model_len // options.block_size),
        )
        self.stage = ""  # for people: what is being set up

    def load(self, progress: Progress) -> CudaRunner:
        options = self._options
        self.stage = "kernels and the step's buffers"
        progress("loading kernels", 0.0)
        torch.cuda.set_device(self._device.ordinal)
        _sum_in_float32()
        backend = CudaBackend(self._device, self._config, self._shape, self._sizes)
        self.stage = "the weights"
        model = self._load_model(backend, partial(progress, "loading weights"))
        torch.cuda.empty_cache()
        self.stage = "the KV pool"
        progress("locking host memory", 0.0)
        block_bytes = self._shape.block_bytes
        host = HostBlocks(options.host_memory_bytes // block_bytes, block_bytes)
        budget = options.kv_memory_bytes
        if budget is None:
            # What the rest takes is known once it was all done; that needs no more than padding.
            pool = self._pool(backend, _WARM_UP_BLOCKS, HostBlocks(0, block_bytes))
        else:
            pool = self._pool(backend, self._num_blocks(budget), host)
        self.stage = "the largest step and the graphs"
        runner = CudaRunner(self._info(pool), self._device, model, backend, pool)
        runner.warm_up(partial(progress, "warming up"))
        if budget is None:
            self.stage = "the KV pool"
            pool = self._pool(backend, self._num_blocks(self._left(len(host.blocks))), host)
            runner.use_pool(pool, self._info(pool), partial(progress, "capturing graphs"))
        self._report(runner.info)
        progress("ready", 1.0)
        return runner

    def _info(self, pool: CudaKvPool) -> RunnerInfo:
        options = self._options
        return RunnerInfo(
            model_digest=self._directory.digest,
            model_name=self._directory.name,
            vocab_size=self._config.vocab_size,
            max_model_len=self._sizes.max_model_len,
            block_size=options.block_size,
            num_device_blocks=pool.num_device_blocks,
            num_host_blocks=len(pool.host),
            max_rows=options.max_rows,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_bytes=self._shape.block_bytes,
            device=f"{self._device.name} ({options.element})",
            swap_bytes_per_s=pool.measure_swap_rate(),
        )

    def _load_model(self, backend: CudaBackend, progress: Callable[[float], None]) -> LlamaModel:
        with torch.inference_mode():
            if self._options.is_dummy:
                weights = DummyWeights(backend.torch_device)
                return load_llama(self._config, weights, backend, progress)
            with Weights(self._directory.weight_files) as stored:
                return load_llama(self._config, stored, backend, progress)

    def _pool(self, backend: CudaBackend, num_blocks: int, host: HostBlocks) -> CudaKvPool:
        block_bytes = self._shape.block_bytes
        return CudaKvPool(self._device, backend.stream, num_blocks, host, block_bytes)

    def _num_blocks(self, memory_bytes: int) -> int:
        """Raises KvPoolError."""
        most = _MAX_SLOTS // self._options.block_size
        return min(KvPool.num_blocks(memory_bytes, self._shape.block_bytes), most)

    def _left(self, num_host_blocks: int) -> int:
        """Bytes for the pool, now that everything else has been done once."""
        free, total = torch.cuda.mem_get_info()
        reserve = max(total - int(total * self._options.memory_utilization), _RESERVE_BYTES)
        block_bytes = self._shape.block_bytes
        staging = 2 * num_staging_blocks(block_bytes) * block_bytes if num_host_blocks else 0
        return max(0, free - reserve - staging)

    def _report(self, info: RunnerInfo) -> None:
        """Log where the memory is [MiB]."""
        free, total = (size // _MIB for size in torch.cuda.mem_get_info())
        pool = info.num_device_blocks * info.block_bytes // _MIB
        logs.event(log, "GPU memory", total_mib=total, free_mib=free, kv_pool_mib=pool)

    def explain_shortage(self) -> str:
        """For people: what was needed, what there is, what to change."""
        free, total = (size // _MIB for size in torch.cuda.mem_get_info())
        used = torch.cuda.memory_allocated() // _MIB
        return (
            f"the GPU's memory does not hold {self.stage}: {used} MiB are taken by this process, "
            f"{free} of {total} MiB are free; choose a smaller model, --kv-memory, "
            "--max-num-batched-tokens or --max-num-seqs, or end what else uses the GPU"
        )

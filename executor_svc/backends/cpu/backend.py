"""The Backend protocol on CPU threads: oneDNN products, numba kernels, a pool of float32 tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor_svc.backends.base import Linear
from executor_svc.backends.cpu import attention, glue, work
from executor_svc.backends.cpu.jit import MAX_THREADS
from executor_svc.backends.cpu.linear import CpuLinear, choose_forms
from executor_svc.backends.cpu.simd import LANES, FloatArray
from executor_svc.kv_pool import KvPool
from executor_svc.model.codes import Codes
from executor_svc.model.config import ModelConfig
from executor_svc.model.errors import UnsupportedModelError
from executor_svc.runner import IntArray, StepBatch

# Enough query vectors per (query tile, KV head) that keys read from cache are used well, few
# enough that their scores stay in the first-level cache.
_QUERIES_PER_TILE: Final = 32

_NO_NORM: Final = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share."""

    positions: npt.NDArray[np.int64]  # [T]
    slots: npt.NDArray[np.int64]  # [T], see glue.write_kv
    block_table: IntArray
    items: npt.NDArray[np.int64]  # see work
    merges: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    partials: FloatArray
    attended: Tensor  # [T, heads * head_dim], what `attend` returns, overwritten by every layer
    flat_attended: FloatArray


class CpuBackend:
    """One process's CPU threads. Calls come from one thread at a time."""

    def __init__(
        self,
        config: ModelConfig,
        block_size: int,
        max_tokens: int,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        """Prepare tables and scratch memory for steps of up to max_tokens.

        Raises UnsupportedModelError for sizes that the kernels' vectors do not divide.
        """
        check_sizes(config, block_size)
        self._config = config
        self.num_threads = num_threads
        self._eps = np.float32(config.rms_norm_eps)
        group = config.num_heads // config.num_kv_heads
        self._query_tile = max(1, _QUERIES_PER_TILE // group)
        self._max_queries = self._query_tile * group
        tiles = block_size // work.TILE
        dim = config.head_dim
        block_elements = block_size * config.kv_elements_per_token
        self._shape = np.array(
            [config.num_heads, config.num_kv_heads, dim, tiles, block_elements], np.int64
        )
        self._angles = config.rope.angles(max_model_len).reshape(-1)
        self._pool: FloatArray = np.empty(0, np.float32)
        self._linears: list[CpuLinear] = []
        self._step: _Step | None = None
        self._residual = torch.empty(max_tokens, config.hidden_size)
        self._normed = torch.empty(max_tokens, config.hidden_size)
        self._activated = torch.empty(max_tokens, config.intermediate_size)
        self._attended = torch.empty(max_tokens, config.num_heads * dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return int(self._shape[4]) * 4

    @property
    def device(self) -> str:
        """For people."""
        return f"cpu ({self.num_threads} threads)"

    def use_pool(self, pool: KvPool) -> None:
        """Keep keys and values in this pool's device blocks."""
        assert pool.block_bytes == self.block_bytes
        self._pool = pool.device.reshape(-1)

    def use_threads(self) -> None:
        """Apply the thread count to the calling thread; both OpenMP runtimes keep it per thread."""
        torch.set_num_threads(self.num_threads)
        numba.set_num_threads(min(self.num_threads, MAX_THREADS))

    def place(self, weight: Tensor) -> Tensor:
        """See Backend."""
        return weight.to(torch.float32)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, codes: Codes | None = None
    ) -> Linear:
        """See Backend. Raises WeightsError if the codes do not decode to the weight."""
        linear = CpuLinear(weight, bias, codes)
        self._linears.append(linear)
        return linear

    def pack_head(self, weight: Tensor, codes: Codes | None = None) -> Linear:
        """See Backend. Raises WeightsError if the codes do not decode to the weight."""
        return self.pack_linear(weight, None, codes)

    def choose_products(self) -> None:
        """Once all weights are packed: time their forms and settle on the faster ones."""
        for is_coded in (True, False):
            choose_forms([linear for linear in self._linears if linear.is_coded is is_coded])

    def begin_step(self, batch: StepBatch, block_table: IntArray) -> None:
        """Lay out the work of one step; block_table is [max_rows, max_blocks_per_row]."""
        config = self._config
        rows = batch.rows.astype(np.int64)
        counts = batch.num_scheduled_tokens.astype(np.int64)
        computed = batch.num_computed_tokens.astype(np.int64)
        items, merges, begins = work.plan_items(
            rows, counts, computed, self._query_tile, config.num_kv_heads, self.num_threads
        )
        positions, slots = work.locate_tokens(rows, counts, computed, block_table, self._shape)
        num_partials = int(merges[:, 2].sum())
        partials = np.empty(num_partials * config.num_heads * (config.head_dim + 2), np.float32)
        attended = self._attended[: positions.size]
        self._step = _Step(
            positions=positions,
            slots=slots,
            block_table=block_table,
            items=items,
            merges=merges,
            begins=begins,
            partials=partials,
            attended=attended,
            flat_attended=_flat(attended),
        )

    def embed(self, table: Tensor, token_ids: IntArray) -> Tensor:
        """Rows of table [vocab_size, hidden] for token_ids [T]; the step's residual stream."""
        out = self._residual[: token_ids.size]
        return torch.index_select(table, 0, torch.from_numpy(token_ids), out=out)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        out = self._normed[: len(x)]
        glue.rms_norm(_flat(x), weight.numpy(), self._eps, _flat(out))
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        out = self._normed[: len(residual)]
        glue.add_rms_norm(_flat(residual), _flat(delta), weight.numpy(), self._eps, _flat(out))
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Backend."""
        out = self._activated[: len(gate_up)]
        glue.silu_mul(_flat(gate_up), self._config.intermediate_size, _flat(out))
        return out

    def write_kv(
        self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        """See Backend."""
        step = self._step
        assert step is not None
        glue.write_kv(
            _flat(qkv),
            step.positions,
            step.slots,
            layer,
            self._angles,
            _NO_NORM if q_norm is None else q_norm.numpy(),
            _NO_NORM if k_norm is None else k_norm.numpy(),
            self._eps,
            self._pool,
            self._shape,
        )

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """See Backend."""
        step = self._step
        assert step is not None
        attention.attend(
            _flat(qkv),
            self._pool,
            step.block_table,
            step.items,
            step.merges,
            step.begins,
            layer,
            self._shape,
            self._max_queries,
            step.flat_attended,
            step.partials,
        )
        return step.attended


def check_sizes(config: ModelConfig, block_size: int) -> None:
    """Raises UnsupportedModelError if the kernels' vectors do not divide the model's sizes."""
    for name, size, unit in (
        ("block_size", block_size, work.TILE),
        ("head_dim", config.head_dim, 2 * LANES),
        ("hidden_size", config.hidden_size, LANES),
        ("intermediate_size", config.intermediate_size, LANES),
    ):
        if size <= 0 or size % unit:
            raise UnsupportedModelError(f"{name} {size} is not a multiple of {unit} (CPU backend)")


def _flat(x: Tensor) -> FloatArray:
    array: FloatArray = x.view(-1).numpy()
    return array

"""The Backend protocol in plain torch: slow, obvious, the oracle of the other backends' tests.

Blocks are [layer][K|V][block_size][kv_head][head_dim]; nothing is fused or reused between calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from executor_svc.backends.base import Linear
from executor_svc.kv_pool import KvPool
from executor_svc.model.codes import Codes
from executor_svc.model.config import ModelConfig
from executor_svc.runner import IntArray, StepBatch


class ReferenceBackend:
    """Keys and values in the device blocks of a pool."""

    def __init__(self, config: ModelConfig, block_size: int, max_model_len: int) -> None:
        self._config = config
        self._block_size = block_size
        angles = torch.from_numpy(config.rope.angles(max_model_len))
        self._cos, self._sin = angles.chunk(2, dim=1)
        self._blocks = torch.empty(0)
        # Per row of the step: (block ids, begin and end in the step's tokens, position of begin).
        self._rows: list[tuple[Tensor, int, int, int]] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self._block_size * self._config.kv_elements_per_token * 4

    def use_pool(self, pool: KvPool) -> None:
        """Keep keys and values in this pool's device blocks."""
        config = self._config
        shape = (config.num_layers, 2, self._block_size, config.num_kv_heads, config.head_dim)
        self._blocks = torch.from_numpy(pool.device).view(-1, *shape)

    def place(self, weight: Tensor) -> Tensor:
        """See Backend."""
        return weight.to(torch.float32)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, codes: Codes | None = None
    ) -> Linear:
        """See Backend."""
        return lambda x: functional.linear(x, weight, bias)

    def pack_head(self, weight: Tensor, codes: Codes | None = None) -> Linear:
        """See Backend."""
        return self.pack_linear(weight, None)

    def begin_step(self, batch: StepBatch, block_table: IntArray) -> None:
        """As CpuBackend.begin_step."""
        self._rows = []
        begin = 0
        columns = (batch.rows, batch.num_scheduled_tokens, batch.num_computed_tokens)
        for row, count, computed in zip(*(c.tolist() for c in columns), strict=True):
            num_blocks = -(-(computed + count) // self._block_size)
            block_ids = torch.from_numpy(block_table[row, :num_blocks].copy()).long()
            self._rows.append((block_ids, begin, begin + count, computed))
            begin += count

    def embed(self, table: Tensor, token_ids: IntArray) -> Tensor:
        """As CpuBackend.embed."""
        return table[torch.from_numpy(token_ids).long()].clone()

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self._config.rms_norm_eps) * weight

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        return self.rms_norm(residual.add_(delta), weight)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Backend."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def write_kv(
        self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        """See Backend."""
        queries, keys, values = self._split(qkv)
        if q_norm is not None:
            queries.copy_(self.rms_norm(queries, q_norm))
        if k_norm is not None:
            keys.copy_(self.rms_norm(keys, k_norm))
        for block_ids, begin, end, computed in self._rows:
            positions = torch.arange(computed, computed + end - begin)
            for heads in (queries, keys):
                heads[begin:end] = self._rotate(heads[begin:end], positions)
            ids, offsets = block_ids[positions // self._block_size], positions % self._block_size
            self._blocks[ids, layer, 0, offsets] = keys[begin:end]
            self._blocks[ids, layer, 1, offsets] = values[begin:end]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """See Backend."""
        queries, _, _ = self._split(qkv)
        out = torch.empty_like(queries)
        group = self._config.num_heads // self._config.num_kv_heads
        for block_ids, begin, end, computed in self._rows:
            length = computed + end - begin
            slots = self._blocks[block_ids, layer].transpose(0, 1).flatten(1, 2)[:, :length]
            keys, values = slots.repeat_interleave(group, dim=2)
            is_later = torch.arange(length) > torch.arange(computed, length)[:, None]
            scores = torch.einsum("qhd,khd->hqk", queries[begin:end], keys)
            scores = scores / self._config.head_dim**0.5
            weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values)
        return out.flatten(1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, heads, head_dim] of queries, keys and values."""
        config = self._config
        heads = qkv.view(len(qkv), -1, config.head_dim)
        keys_begin, values_begin = config.num_heads, config.num_heads + config.num_kv_heads
        return heads[:, :keys_begin], heads[:, keys_begin:values_begin], heads[:, values_begin:]

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        low, high = heads.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

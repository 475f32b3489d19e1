"""A GPU runner in the shadow of the content-checking one: the same plans, the same inputs.

The checking runner says what every slot of both pools should hold: a digest of token and position.
Keys and values of a model's first layer follow from token and position too. So slots with one
digest must hold one thing on the GPU, wherever forks, copies and swaps have taken it; a block
written too late, read too early or copied to the wrong place does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cupy_kernels.shape import TILE_TOKENS, AttentionShape, element_offsets
from executor_svc.backends.checking.digests import POISON
from executor_svc.backends.checking.runner import FakeRunner
from executor_svc.backends.cuda.runner import CudaRunner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, RunnerInfo, StepBatch, StepOutputs

# Products are rounded to bfloat16, and their order of summing depends on the batch.
RELATIVE_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class _ShadowStep:
    checking: PendingStep
    cuda: PendingStep

    def wait(self) -> StepOutputs:
        """The checking runner's outputs, once the GPU is through as well."""
        self.cuda.wait()
        return self.checking.wait()


class ShadowRunner:
    """An executor_svc.runner.Runner that raises AssertionError where the GPU's blocks are wrong."""

    def __init__(self, checking: FakeRunner, cuda: CudaRunner, known: dict[int, Tensor]) -> None:
        """Runners of the same sizes; `known` is what each digest stands for, so far."""
        self._checking = checking
        self._cuda = cuda
        self._known = known
        self.num_slots_checked = 0

    @property
    def info(self) -> RunnerInfo:
        """The checking runner's."""
        return self._checking.info

    def reset(self) -> None:
        """A new epoch."""
        self._checking.reset()
        self._cuda.reset()

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """Both; then compare what is in the pools."""
        cuda = self._cuda.launch(plan, state, batch)
        checking = self._checking.launch(plan, state, batch)
        if batch.sampling_rows.size:
            self._cuda.replace_samples(batch.sampling_rows, checking.wait().token_ids)
        torch.cuda.synchronize()
        pool = self._cuda.pool
        num_blocks = pool.num_device_blocks
        self._check(self._checking.device_digests, pool.blocks[:num_blocks].cpu())
        self._check(self._checking.host_digests, pool.host)
        return _ShadowStep(checking, cuda)

    def _check(self, digests: npt.NDArray[np.uint64], blocks: Tensor) -> None:
        """Digests [num_blocks, block_size] against blocks [num_blocks, block_bytes] uint8."""
        if not digests.size:
            return
        slots = first_layer(blocks, self._cuda.shape)
        for place in np.flatnonzero(digests.reshape(-1) != POISON):
            digest, found = int(digests.reshape(-1)[place]), slots[place]
            wanted = self._known.setdefault(digest, found.clone())
            limit = RELATIVE_TOLERANCE * float(wanted.abs().max())
            assert float((found - wanted).abs().max()) <= limit, f"slot {place} is wrong"
            self.num_slots_checked += 1


def first_layer(blocks: Tensor, shape: AttentionShape) -> Tensor:
    """Keys and values of layer 0 as float32 [num_blocks * block_size, elements of a token].

    blocks: [num_blocks, block_bytes] uint8, on the host.
    """
    tiles_per_block = shape.block_size // TILE_TOKENS
    layer = blocks[:, : shape.layer_bytes].contiguous().view(torch.bfloat16)
    tiles = layer.view(len(blocks), shape.num_kv_heads, tiles_per_block, -1)
    offsets = torch.from_numpy(element_offsets(shape.head_dim))  # [2, tokens, head_dim]
    kv = tiles[..., offsets.reshape(-1)].view(*tiles.shape[:3], *offsets.shape)
    # [blocks, heads, tiles, 2, tokens, dim] -> [blocks, tiles, tokens, heads, 2, dim]
    return kv.permute(0, 2, 4, 1, 3, 5).reshape(len(blocks) * shape.block_size, -1).float()

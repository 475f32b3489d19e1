"""A GPU runner in the shadow of the content-checking one: the same plans, the same inputs.

The checking runner says what every slot of both pools should hold: a digest of token and position.
Keys and values of a model's first layer follow from token and position too. So slots with one
digest must hold one thing on the GPU, wherever forks, copies and swaps have taken it; a block
written too late, read too early or copied to the wrong place does not.

Steps are not waited for. What the pools hold after a step is copied aside in the order of the
streams that write them, and compared some steps later. Streams are held up now and then, so that
several steps are under way, and what one stream forgets to wait for on another shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

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

_DEPTHS = (1, 4, 12)
"""After how many steps pools are compared; after 1, no two steps are ever under way."""
_DELAY_CYCLES = 4_000_000
"""About 2 ms, many times what a step of the small model takes."""
_DELAY_SHARE = 0.2  # of the steps, for each stream

_cuda: Final[Any] = torch.cuda  # its sleep is untyped


@dataclass(frozen=True, slots=True)
class _ShadowStep:
    checking: PendingStep
    cuda: PendingStep

    def wait(self) -> StepOutputs:
        """The checking runner's outputs, once the GPU is through as well."""
        self.cuda.wait()
        return self.checking.wait()


class Known:
    """What each digest stands for, so far."""

    def __init__(self) -> None:
        self._place_of: dict[int, int] = {}
        self._vectors = torch.empty(0)

    def num_different(self, digests: npt.NDArray[np.uint64], found: Tensor) -> int:
        """How many slots hold something else than others of their digest did; learns new digests.

        digests: [n]; found: [n, elements].
        """
        distinct, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        is_new = np.array([digest not in self._place_of for digest in distinct.tolist()], np.bool_)
        for digest in distinct[is_new].tolist():
            self._place_of[digest] = len(self._place_of)
        fresh = found[torch.from_numpy(first[is_new])]
        self._vectors = torch.cat([self._vectors.view(-1, found.shape[1]), fresh])
        places = np.array([self._place_of[digest] for digest in distinct.tolist()], np.int64)
        wanted = self._vectors[torch.from_numpy(places[inverse])]
        limits = RELATIVE_TOLERANCE * wanted.abs().amax(dim=1)
        is_alike = (found - wanted).abs().amax(dim=1) <= limits  # not so if anything is NaN
        return int((~is_alike).sum())


class _Snapshot:
    """Both pools after one step, and what they should hold."""

    def __init__(self, cuda: CudaRunner) -> None:
        """Allocate on the device."""
        pool = cuda.pool
        self._device_pool, self._host_pool = pool.blocks[: pool.num_device_blocks], pool.host
        device = pool.blocks.device
        self.device = torch.empty_like(self._device_pool)
        self.host = torch.empty(pool.host.shape, dtype=torch.uint8, device=device)
        self.device_digests = self.host_digests = np.empty(0, np.uint64)

    def take(self, checking: FakeRunner, main: torch.cuda.Stream, swaps: torch.cuda.Stream) -> None:
        """Enqueue behind what the streams were given so far."""
        with torch.cuda.stream(main):
            self.device.copy_(self._device_pool)
        with torch.cuda.stream(swaps):
            self.host.copy_(self._host_pool, non_blocking=True)
        self.device_digests = checking.device_digests.copy()
        self.host_digests = checking.host_digests.copy()


class ShadowRunner:
    """An executor_svc.runner.Runner that raises AssertionError where the GPU's blocks are wrong."""

    def __init__(
        self, checking: FakeRunner, cuda: CudaRunner, known: Known, rng: random.Random
    ) -> None:
        """Runners of the same sizes; `known` may be shared with earlier ones of one model."""
        self._checking = checking
        self._cuda = cuda
        self._known = known
        self._rng = rng
        self._main, self._swaps = cuda._stream, cuda.pool._side
        self._streams = (self._main, self._swaps, cuda._side)
        self._snapshots = [_Snapshot(cuda) for _ in range(rng.choice(_DEPTHS))]
        self._num_taken = 0
        self.num_slots_checked = 0
        # What nobody wrote is NaN.
        cuda.pool.blocks.fill_(0xFF)
        cuda.pool.host.fill_(0xFF)
        torch.cuda.synchronize()

    @property
    def info(self) -> RunnerInfo:
        """The checking runner's."""
        return self._checking.info

    def reset(self) -> None:
        """A new epoch."""
        self._checking.reset()
        self._cuda.reset()

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """Both; what is in the pools is compared when enough steps were launched."""
        for stream in self._streams:
            if self._rng.random() < _DELAY_SHARE:
                with torch.cuda.stream(stream):
                    _cuda._sleep(_DELAY_CYCLES)
        cuda = self._cuda.launch(plan, state, batch)
        checking = self._checking.launch(plan, state, batch)
        if batch.sampling_rows.size:
            self._cuda.replace_samples(batch.sampling_rows, checking.wait().token_ids)
        self._snapshots[self._num_taken].take(self._checking, self._main, self._swaps)
        self._num_taken += 1
        if self._num_taken == len(self._snapshots):
            self.compare()
        return _ShadowStep(checking, cuda)

    def compare(self) -> None:
        """Wait for the steps launched so far, and compare what each left in the pools."""
        torch.cuda.synchronize()
        for snapshot in self._snapshots[: self._num_taken]:
            self._check(snapshot.device_digests, snapshot.device.cpu())
            self._check(snapshot.host_digests, snapshot.host.cpu())
        self._num_taken = 0

    def _check(self, digests: npt.NDArray[np.uint64], blocks: Tensor) -> None:
        """Digests [num_blocks, block_size] against blocks [num_blocks, block_bytes] uint8."""
        is_written = digests.reshape(-1) != POISON
        if is_written.any():
            found = first_layer(blocks, self._cuda.shape)[torch.from_numpy(is_written)]
            wrong = self._known.num_different(digests.reshape(-1)[is_written], found)
            assert not wrong, f"{wrong} of {len(found)} slots are wrong"
            self.num_slots_checked += len(found)


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

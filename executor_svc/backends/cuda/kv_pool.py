"""Blocks on the device, blocks in pinned host memory, and what moves between them.

Swaps go through a few staging blocks: a kernel copies between pool and staging in the step's order,
at the memory's speed, and the slow copy over PCIe runs beside the computation on a stream of its
own. So a block that is swapped out may be overwritten in the same plan, and one that is swapped in
comes over while earlier steps still run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cupy_kernels.copy_blocks import CopyBlocks
from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from executor_svc.backends.cuda.streams import new_event, new_stream
from executor_svc.plan import Plan

_STAGING_BYTES: Final = 128 << 20
_MAX_STAGING: Final = 64
_MIN_STAGING: Final = 4

Put = Callable[[npt.NDArray[np.int32]], Tensor]
"""Sends an array with the step; returns where it will be on the device."""


class CudaKvPool:
    """A block is opaque here. Block 0 is the padding block."""

    def __init__(
        self,
        device: Device,
        stream: torch.cuda.Stream,
        num_device_blocks: int,
        num_host_blocks: int,
        block_bytes: int,
    ) -> None:
        """Allocate both pools. Raises torch.OutOfMemoryError or RuntimeError."""
        self.num_device_blocks = num_device_blocks
        self._num_staging = staging_blocks(block_bytes) if num_host_blocks else 0
        size = (num_device_blocks + 2 * self._num_staging, block_bytes)
        # [blocks, block_bytes], staging behind the pool: first for out, then for in.
        self.blocks = torch.empty(size, dtype=torch.uint8, device=stream.device)
        pinned = num_host_blocks > 0
        self.host = torch.empty(num_host_blocks, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._copy_blocks = CopyBlocks(device)
        self._main = stream
        self._side = new_stream(stream.device)
        self._is_out_free, self._is_in_free = new_event(), new_event()

    def stage(self, plan: Plan, put: Put) -> list[Callable[[], None]]:
        """What enqueues a plan's moves, to be called in order once the step was uploaded."""
        out_begin = self.num_device_blocks
        in_begin = out_begin + self._num_staging
        moves: list[Callable[[], None]] = []
        for device_ids, host_ids in self._chunks(plan.swap_out.src, plan.swap_out.dst):
            staging = np.arange(out_begin, out_begin + device_ids.size)
            launch = self._pack(device_ids, staging, put)
            moves.append(partial(self._swap_out, launch, host_ids.tolist()))
        if plan.copy.src.size:
            launch = self._pack(plan.copy.src, plan.copy.dst, put)
            moves.append(partial(launch.run, self._main.cuda_stream))
        for device_ids, host_ids in self._chunks(plan.swap_in.dst, plan.swap_in.src):
            staging = np.arange(in_begin, in_begin + device_ids.size)
            launch = self._pack(staging, device_ids, put)
            moves.append(partial(self._swap_in, launch, host_ids.tolist()))
        return moves

    def _chunks(
        self, device_ids: npt.NDArray[np.uint32], host_ids: npt.NDArray[np.uint32]
    ) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]]:
        """Pairs by as many as staging holds."""
        step = max(1, self._num_staging)
        begins = range(0, device_ids.size, step)
        return [(device_ids[b : b + step], host_ids[b : b + step]) for b in begins]

    def _pack(
        self, sources: npt.NDArray[np.integer], targets: npt.NDArray[np.integer], put: Put
    ) -> Launch:
        ids = [put(each.astype(np.int32)) for each in (sources, targets)]
        return self._copy_blocks.pack(pool=self.blocks, sources=ids[0], targets=ids[1])

    def _swap_out(self, launch: Launch, host_ids: list[int]) -> None:
        self._main.wait_event(self._is_out_free)
        launch.run(self._main.cuda_stream)
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            for place, host_id in enumerate(host_ids, self.num_device_blocks):
                self.host[host_id].copy_(self.blocks[place], non_blocking=True)
            self._is_out_free.record(self._side)

    def measure_swap_rate(self) -> float:
        """Bytes per second from host to device, the slower way; 0 without a host pool.

        Moves blocks of no meaning through staging; waits for the device.
        """
        count = min(self._num_staging, len(self.host))
        if not count:
            return 0.0
        begin, end = new_event(is_timed=True), new_event(is_timed=True)
        staging = self.blocks[self.num_device_blocks :]
        with torch.cuda.stream(self._side):
            for _ in range(2):  # the first round warms up
                begin.record(self._side)
                for index in range(count):
                    staging[index].copy_(self.host[index], non_blocking=True)
                end.record(self._side)
        end.synchronize()
        return float(count * self.blocks.shape[1] / (begin.elapsed_time(end) / 1e3))

    def _swap_in(self, launch: Launch, host_ids: list[int]) -> None:
        first = self.num_device_blocks + self._num_staging
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._is_in_free)
            for place, host_id in enumerate(host_ids, first):
                self.blocks[place].copy_(self.host[host_id], non_blocking=True)
        self._main.wait_stream(self._side)
        launch.run(self._main.cuda_stream)
        self._is_in_free.record(self._main)


def staging_blocks(block_bytes: int) -> int:
    """Blocks on the way in one direction at a time."""
    return max(_MIN_STAGING, min(_MAX_STAGING, _STAGING_BYTES // block_bytes))

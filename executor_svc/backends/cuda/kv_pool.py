"""Blocks on the device, blocks in locked host memory, and what moves between them.

Swaps go through staging blocks: a kernel copies between pool and staging in the step's order, at
the memory's speed, and the slow copy over PCIe runs beside the computation on a stream of its own.
So a block that is swapped out may be overwritten in the same plan, and one that is swapped in comes
over while earlier steps still run. Staging is cut into pieces that take turns, so a step waits for
the link only once all of them are on their way. The link's copies run in the order in which they
are enqueued: one step reads from the host what an earlier one wrote there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cupy_kernels.copy_blocks import CopyBlocks
from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from executor_svc.backends.cuda.host_memory import HostBlocks
from executor_svc.backends.cuda.streams import new_event, new_stream
from executor_svc.plan import Plan

_NUM_PIECES: Final = 8
_STAGING_BYTES: Final = 256 << 20
_MAX_PIECE: Final = 16
"""Blocks; with them a burst of 2,048 tokens and more passes without waiting."""

Put = Callable[[npt.NDArray[np.int32]], Tensor]
"""Sends an array with the step; returns where it will be on the device."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Staging blocks that are on their way together."""

    begin: int  # the first one's id in the pool's tensor
    num_blocks: int
    is_filled: torch.cuda.Event  # recorded by who copies in
    is_free: torch.cuda.Event  # recorded by who copies out


@dataclass(frozen=True, slots=True)
class _Move:
    """Some pairs of a swap: the kernel between pool and staging, and the link's copies."""

    piece: _Piece
    launch: Launch
    host_ids: list[int]


class CudaKvPool:
    """A block is opaque here. Block 0 is the padding block."""

    def __init__(
        self,
        device: Device,
        stream: torch.cuda.Stream,
        num_device_blocks: int,
        host: HostBlocks,
        block_bytes: int,
    ) -> None:
        """Allocate the device's pool. Raises torch.OutOfMemoryError."""
        self.num_device_blocks = num_device_blocks
        self._host_blocks = host
        self.host = host.blocks  # [num_host_blocks, block_bytes] uint8
        num_staging = num_staging_blocks(block_bytes) if len(self.host) else 0
        size = (num_device_blocks + 2 * num_staging, block_bytes)
        # [blocks, block_bytes], staging behind the pool: first for out, then for in.
        self.blocks = torch.empty(size, dtype=torch.uint8, device=stream.device)
        self._copy_blocks = CopyBlocks(device)
        self._main = stream
        self._side = new_stream(stream.device)
        self._out = _pieces(num_device_blocks, num_staging)
        self._in = _pieces(num_device_blocks + num_staging, num_staging)
        self._num_out = self._num_in = 0  # moves so far: whose turn it is

    def stage(self, plan: Plan, put: Put) -> list[Callable[[], None]]:
        """What enqueues a plan's moves, to be called in order once the step was uploaded.

        Blocks that come in are fetched first: then they need not wait for those that go out, nor,
        like these, for the step before. No plan reads from the host what it writes there.
        """
        out = self._moves(plan.swap_out.src, plan.swap_out.dst, self._out, self._num_out, put)
        into = self._moves(plan.swap_in.dst, plan.swap_in.src, self._in, self._num_in, put)
        self._num_out += len(out)
        self._num_in += len(into)
        ahead = len(self._in)
        calls: list[Callable[[], None]] = [partial(self._fetch, move) for move in into[:ahead]]
        calls += [partial(self._swap_out, move) for move in out]
        if plan.copy.src.size:
            launch = self._pack(plan.copy.src, plan.copy.dst, put)
            calls.append(partial(launch.run, self._main.cuda_stream))
        for place, move in enumerate(into):
            calls.append(partial(self._swap_in, move))
            calls += [partial(self._fetch, later) for later in into[place + ahead :][:1]]
        return calls

    def _moves(
        self,
        device_ids: npt.NDArray[np.uint32],
        host_ids: npt.NDArray[np.uint32],
        pieces: list[_Piece],
        first_turn: int,
        put: Put,
    ) -> list[_Move]:
        """Pairs by as many as a piece holds."""
        moves: list[_Move] = []
        begin = 0
        while begin < device_ids.size:
            piece = pieces[(first_turn + len(moves)) % len(pieces)]
            ids = device_ids[begin : begin + piece.num_blocks]
            staging = np.arange(piece.begin, piece.begin + ids.size)
            sources, targets = (ids, staging) if pieces is self._out else (staging, ids)
            launch = self._pack(sources, targets, put)
            moves.append(_Move(piece, launch, host_ids[begin : begin + ids.size].tolist()))
            begin += ids.size
        return moves

    def _pack(
        self, sources: npt.NDArray[np.integer], targets: npt.NDArray[np.integer], put: Put
    ) -> Launch:
        ids = [put(each.astype(np.int32)) for each in (sources, targets)]
        return self._copy_blocks.pack(pool=self.blocks, sources=ids[0], targets=ids[1])

    def _swap_out(self, move: _Move) -> None:
        piece = move.piece
        self._main.wait_event(piece.is_free)
        move.launch.run(self._main.cuda_stream)
        piece.is_filled.record(self._main)
        self._side.wait_event(piece.is_filled)
        with torch.cuda.stream(self._side):
            for place, host_id in enumerate(move.host_ids, piece.begin):
                _enqueue_copy(self.host[host_id], self.blocks[place])
        piece.is_free.record(self._side)

    def _fetch(self, move: _Move) -> None:
        piece = move.piece
        self._side.wait_event(piece.is_free)
        with torch.cuda.stream(self._side):
            for place, host_id in enumerate(move.host_ids, piece.begin):
                _enqueue_copy(self.blocks[place], self.host[host_id])
        piece.is_filled.record(self._side)

    def _swap_in(self, move: _Move) -> None:
        piece = move.piece
        self._main.wait_event(piece.is_filled)
        move.launch.run(self._main.cuda_stream)
        piece.is_free.record(self._main)

    def measure_swap_rate(self) -> float:
        """Bytes per second from host to device, the slower way; 0 without a host pool.

        Moves blocks of no meaning through staging; waits for the device.
        """
        staging = self.blocks[self.num_device_blocks :]
        count = min(len(staging), len(self.host))
        if not count:
            return 0.0
        begin, end = new_event(is_timed=True), new_event(is_timed=True)
        with torch.cuda.stream(self._side):
            for _ in range(2):  # the first round warms up
                begin.record(self._side)
                for index in range(count):
                    _enqueue_copy(staging[index], self.host[index])
                end.record(self._side)
        end.synchronize()
        return float(count * self.blocks.shape[1] / (begin.elapsed_time(end) / 1e3))


def _enqueue_copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def num_staging_blocks(block_bytes: int) -> int:
    """Blocks on the way in one direction."""
    return _NUM_PIECES * max(1, min(_MAX_PIECE, _STAGING_BYTES // (_NUM_PIECES * block_bytes)))


def _pieces(begin: int, num_blocks: int) -> list[_Piece]:
    size = num_blocks // _NUM_PIECES
    return [
        _Piece(begin + place * size, size, new_event(), new_event())
        for place in range(_NUM_PIECES)
        if size
    ]

"""What a load does inside the server: pools, steps and CPU time, seen from outside it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from benchmarks.processes import cpu_seconds
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc
from blockyard.launcher.server import LocalServer

_INTERVAL_S: Final = 0.5
_TIMEOUT_S: Final = 5.0
_COUNTERS: Final = (
    *("num_finished", "num_recoveries", "num_preemptions_by_recompute", "num_preemptions_by_swap"),
    *("num_hit_tokens_device", "num_swapped_out", "num_swapped_in", "num_copied"),
    *("num_prompt_tokens", "num_output_tokens", "num_steps"),
)


@dataclass(slots=True)
class ServerLoad:
    """One load. Slots are summed over the samples, so that a ratio of sums is a mean over time."""

    num_samples: int = 0
    unused_slots: int = 0
    held_slots: int = 0
    max_held_share: float = 0.0
    """Most of the usable device pool that requests held."""
    max_running: int = 0
    max_waiting: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    """What the load added to the engine's."""
    cores: dict[str, float] = field(default_factory=dict)
    """CPU time per time of each of the server's processes."""

    def add(self, snapshot: pb.SnapshotResponse) -> None:
        """Take one sample."""
        pool = snapshot.device
        held = pool.num_stored + pool.num_in_flight + pool.num_unused
        usable = pool.num_slots - pool.num_padding
        self.num_samples += 1
        self.unused_slots += pool.num_unused
        self.held_slots += held
        self.max_held_share = max(self.max_held_share, held / usable if usable else 0.0)
        self.max_running = max(self.max_running, snapshot.num_running)
        self.max_waiting = max(self.max_waiting, snapshot.num_waiting)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kv_waste": self.unused_slots / self.held_slots if self.held_slots else None,
            "max_held_share": self.max_held_share,
            "max_running": self.max_running,
            "max_waiting": self.max_waiting,
            "counters": self.counters,
            "cores": self.cores,
        }


@contextlib.asynccontextmanager
async def watch(server: LocalServer) -> AsyncIterator[ServerLoad]:
    """Sample the server inside the block; the load is complete after it.

    An engine that does not answer, or a process that was replaced, leaves its part empty.
    """
    load = ServerLoad()
    async with grpc.aio.insecure_channel(server.engine_address, options=LINK_OPTIONS) as channel:
        stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
        before = await _snapshot(stub)
        cpu_before, start_s = _cpu_seconds(server), time.monotonic()
        sampling = asyncio.create_task(_sample(stub, load))
        try:
            yield load
        finally:
            sampling.cancel()
            seconds = time.monotonic() - start_s
            cpu_after, after = _cpu_seconds(server), await _snapshot(stub)
            load.cores = {
                name: (cpu_after[name] - used_s) / seconds
                for name, used_s in cpu_before.items()
                if name in cpu_after
            }
            if before is not None and after is not None:
                load.counters = {
                    name: getattr(after.counters, name) - getattr(before.counters, name)
                    for name in _COUNTERS
                }


async def _sample(stub: engine_pb2_grpc.EngineServiceAsyncStub, load: ServerLoad) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        snapshot = await _snapshot(stub)
        if snapshot is not None:
            load.add(snapshot)


async def _snapshot(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> pb.SnapshotResponse | None:
    try:
        return await stub.Snapshot(pb.SnapshotRequest(), timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None


def _cpu_seconds(server: LocalServer) -> dict[str, float]:
    """By the process's name and id, so that a new process does not count on from an old one."""
    found = {}
    for name, pid in server.pids.items():
        with contextlib.suppress(OSError):
            found[f"{name} {pid}"] = cpu_seconds(pid)
    return found

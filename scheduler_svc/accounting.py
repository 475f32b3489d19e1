"""What the pools hold and what was done to them, exactly. See SnapshotResponse in engine.proto."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler_svc.residents import Residents


@dataclass(slots=True)
class Counters:
    """Since the scheduler was made."""

    num_finished: int = 0
    num_recoveries: int = 0
    num_preemptions_by_recompute: int = 0
    num_preemptions_by_swap: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens_device: int = 0
    num_hit_tokens_host: int = 0
    num_evicted: int = 0
    num_copied: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_expired: int = 0


@dataclass(frozen=True, slots=True)
class DevicePool:
    """Token slots by class; they sum to num_slots, all but num_saved_by_sharing."""

    num_slots: int
    num_stored: int
    num_in_flight: int
    num_unused: int
    num_cached: int
    num_free: int
    num_padding: int
    num_saved_by_sharing: int

    @property
    def waste(self) -> float:
        """Share of the held slots that hold nothing and wait for nothing under way."""
        held = self.num_stored + self.num_in_flight + self.num_unused
        return self.num_unused / held if held else 0.0


@dataclass(frozen=True, slots=True)
class HostPool:
    """Token slots by class; they sum to num_slots."""

    num_slots: int
    num_swapped: int
    num_cached: int
    num_free: int


@dataclass(frozen=True, slots=True)
class Accounting:
    """A consistent picture between two steps."""

    device: DevicePool
    host: HostPool
    counters: Counters = field(default_factory=Counters)


def device_pool(residents: Residents) -> DevicePool:
    """Count the slots of the device pool. O(running branches)."""
    kv, rows = residents.kv, residents.rows
    pool, block_size = kv.pool, kv.block_size
    running = [branch.row for branch in residents.running.values()]
    # Blocks with several holders are full ones of a common prefix, counted by each.
    num_saved = kv.num_saved_blocks() * block_size
    num_planned = int(rows.num_planned[running].sum()) - num_saved
    num_in_flight = sum(
        int(plan.tokens_per_row[rows.generations[plan.rows] == plan.generations].sum())
        for plan in residents.in_flight
    )
    return DevicePool(
        num_slots=pool.num_blocks * block_size,
        num_stored=num_planned - num_in_flight,
        num_in_flight=num_in_flight,
        num_unused=pool.num_used * block_size - num_planned,
        num_cached=pool.num_cached * block_size,
        num_free=(pool.num_free - pool.num_cached) * block_size,
        num_padding=pool.num_reserved * block_size,
        num_saved_by_sharing=num_saved,
    )


def host_pool(residents: Residents) -> HostPool:
    """Count the slots of the host pool."""
    host, block_size = residents.kv.host, residents.kv.block_size
    return HostPool(
        num_slots=host.num_blocks * block_size,
        num_swapped=host.num_used * block_size,
        num_cached=host.num_cached * block_size,
        num_free=(host.num_free - host.num_cached) * block_size,
    )

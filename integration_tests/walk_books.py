"""What the pools must hold at any moment of a random walk."""

from __future__ import annotations

import numpy as np

from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler


def check_books(scheduler: Scheduler, requests: list[Request]) -> None:
    """Assert that both pools hold exactly what branches hold, and that their classes sum up."""
    branches = [branch for request in requests for branch in request.branches]
    scheduler.kv.check_conservation(branches)
    accounting = scheduler.snapshot()
    device, host = accounting.device, accounting.host
    held = (device.num_stored, device.num_in_flight, device.num_unused)
    others = (device.num_cached, device.num_free, device.num_padding)
    assert sum(held) + sum(others) == device.num_slots, device
    assert min(*held, *others, device.num_saved_by_sharing) >= 0, device
    assert host.num_swapped + host.num_cached + host.num_free == host.num_slots, host
    rows = [branch.row for branch in scheduler.running.values()]
    stored = distinct_slots(scheduler, rows)
    assert stored == device.num_stored + device.num_in_flight, (stored, device)


def distinct_slots(scheduler: Scheduler, rows: list[int]) -> int:
    """Slots that rows have filled or are filling, each counted once."""
    block_size, slots = scheduler.limits.block_size, [np.empty(0, np.int64)]
    for row in rows:
        positions = np.arange(scheduler.rows.num_planned[row])
        block_ids = scheduler.kv.table(row)[positions // block_size]
        slots.append(block_ids * block_size + positions % block_size)
    return len(np.unique(np.concatenate(slots)))

"""The accounting against a count of every slot, one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from scheduler_svc.accounting import DevicePool
from scheduler_svc.beam import BeamParams
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Request
from scheduler_svc.tests.driver import EOS, TOKEN, Driver, Scores

Slot = tuple[int, int]
"""Block id and offset."""

_NUM_ACTIONS: Final = 250
_MAX_IN_FLIGHT: Final = 3


def rows_under_way(driver: Driver) -> Iterator[tuple[int, int]]:
    """Row and number of tokens, of each running branch in each plan in flight."""
    rows = driver.scheduler.rows
    for plan in driver.scheduler.in_flight:
        decodes = [1] * plan.num_decode_rows
        counts = [*decodes, *plan.num_scheduled_tokens]
        for row, generation, count in zip(
            plan.rows.tolist(), plan.generations.tolist(), counts, strict=True
        ):
            if rows.generations[row] == generation:
                yield row, count


def counted(driver: Driver) -> DevicePool:
    """The device pool by classes, from the tables alone."""
    scheduler = driver.scheduler
    pool, block_size = scheduler.kv.pool, scheduler.limits.block_size
    slots: dict[int, list[Slot]] = {}
    for branch in scheduler.running.values():
        table = scheduler.kv.table(branch.row).tolist()
        end = int(scheduler.rows.num_planned[branch.row])
        slots[branch.row] = [(table[p // block_size], p % block_size) for p in range(end)]
    under_way: set[Slot] = set()
    num_left = {row: len(of_row) for row, of_row in slots.items()}
    for row, count in reversed(list(rows_under_way(driver))):
        under_way.update(slots[row][num_left[row] - count : num_left[row]])
        num_left[row] -= count
    distinct = {slot for of_row in slots.values() for slot in of_row}
    num_held = int((pool.ref_counts(np.arange(pool.num_blocks)) > 0).sum())
    return DevicePool(
        num_slots=pool.num_blocks * block_size,
        num_stored=len(distinct - under_way),
        num_in_flight=len(under_way),
        num_unused=num_held * block_size - len(distinct),
        num_cached=pool.num_cached * block_size,
        num_free=(pool.num_usable - num_held - pool.num_cached) * block_size,
        num_padding=block_size,
        num_saved_by_sharing=sum(map(len, slots.values())) - len(distinct),
    )


class Wanderer:
    """Random things happen to a driver whose pool is too small for them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.driver = Driver(
            Policy(rng.choice(list(PreemptionMode)), is_caching=rng.random() < 0.8),
            num_device_blocks=rng.randint(10, 24),
            num_host_blocks=rng.choice([0, 8]),
            max_model_len=33,
            watermark_blocks=rng.randint(0, 1),
        )

    def act(self) -> None:
        """One random step of life."""
        driver, rng = self.driver, self.rng
        choice = rng.random()
        if choice < 0.15:
            self.submit()
        elif choice < 0.18:
            driver.scheduler.flush_cache()
        elif choice < 0.2:
            driver.begin_epoch()
        elif choice < 0.23 and (live := [r for r in driver.requests if not r.is_finished]):
            driver.scheduler.abort(rng.choice(live))
        elif choice < 0.6 and len(driver.scheduler.in_flight) < _MAX_IN_FLIGHT:
            driver.try_plan()
        elif driver.scheduler.in_flight:
            self.commit()

    def submit(self) -> Request:
        """A request of some kind, with a prompt that others have too."""
        rng = self.rng
        prompt = [10 + rng.randrange(2)] * rng.randint(1, 14)
        max_tokens = rng.randint(1, 12)
        kind = rng.randrange(3)
        if kind == 0:
            beam = BeamParams(rng.randint(1, 3))
            fits = self.driver.limits.max_beam_tokens(len(prompt), beam.width) - len(prompt)
            if fits >= 1:
                return self.driver.submit(prompt, min(max_tokens, fits), beam=beam)
        return self.driver.submit(prompt, max_tokens, num_samples=rng.randint(1, 3) if kind else 1)

    def commit(self) -> None:
        """Random tokens, and random candidates for whoever asked."""
        driver, rng = self.driver, self.rng
        plan = driver.scheduler.in_flight[0]
        asked = 0 if plan.num_candidates is None else int((plan.num_candidates > 0).sum())
        scores: list[Scores] = [
            {token_id: -5 * rng.random() for token_id in (EOS, *range(TOKEN, TOKEN + 5))}
            for _ in range(asked)
        ]
        tokens = [rng.choice([EOS, TOKEN, TOKEN, TOKEN + 1]) for _ in plan.sampling_rows]
        driver.commit(tokens, scores)


@pytest.mark.parametrize("seed", range(12))
def test_every_slot_is_in_the_class_that_a_count_puts_it_in(seed: int) -> None:
    wanderer = Wanderer(seed)
    driver = wanderer.driver
    seen: set[str] = set()
    for _ in range(_NUM_ACTIONS):
        wanderer.act()
        expected = counted(driver)
        assert driver.scheduler.snapshot().device == expected
        seen |= {name for name in DevicePool.__slots__ if getattr(expected, name)}
    assert seen >= set(DevicePool.__slots__) - {"num_cached"}  # some have no cache
    driver.run_dry()


def test_an_empty_pool_wastes_nothing() -> None:
    driver = Driver()
    device, host = driver.scheduler.snapshot().device, driver.scheduler.snapshot().host
    assert (device.num_slots, device.num_free, device.num_padding) == (132, 128, 4)
    assert device.waste == 0.0
    assert host.num_slots == 0


def test_waste_is_the_share_of_held_slots_that_nothing_fills() -> None:
    driver = Driver()
    driver.submit(5)
    driver.plan()
    device = driver.scheduler.snapshot().device
    assert (device.num_stored, device.num_in_flight, device.num_unused) == (0, 5, 3)
    assert device.waste == 3 / 8
    driver.commit()
    assert driver.scheduler.snapshot().device.num_stored == 5


def test_what_ended_meanwhile_is_no_longer_under_way() -> None:
    driver = Driver()
    request = driver.submit(5)
    driver.plan()
    driver.scheduler.abort(request)
    device = driver.scheduler.snapshot().device
    assert (device.num_stored, device.num_in_flight, device.num_unused) == (0, 0, 0)
    assert device.num_cached == 4


def test_counters_count_requests_tokens_and_steps() -> None:
    driver = Driver()
    driver.run(5, max_tokens=3)
    driver.run(6, max_tokens=2, num_samples=2)
    counters = driver.scheduler.snapshot().counters
    assert counters.num_finished == 2
    assert counters.num_prompt_tokens == 11
    assert counters.num_output_tokens == 3 + 4
    assert counters.num_steps == driver.scheduler.last_step_id


def test_a_snapshot_does_not_change_with_what_comes_after() -> None:
    driver = Driver()
    before = driver.scheduler.snapshot()
    driver.run(5)
    assert before.counters.num_steps == 0

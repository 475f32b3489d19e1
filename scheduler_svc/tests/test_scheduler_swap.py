"""Scenarios of the host pool: what a preempted branch keeps there, and what is evicted to it."""

from __future__ import annotations

import pytest

from scheduler_svc.cost_model import CostModel
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Branch, RequestStatus
from scheduler_svc.step_plan import StepPlan
from scheduler_svc.tests.driver import (
    PARTING,
    RECOMPUTE,
    SWAP,
    WIDTH_2,
    Driver,
    go_on,
    make_request,
    new_row_of,
    num_preemptions,
    output_ids,
)

PROMPT = list(range(10, 42))
AUTO = Policy(PreemptionMode.AUTO)


def pressed(
    policy: Policy = SWAP,
    num_host_blocks: int = 16,
    cost_model: CostModel | None = None,
    num_steps: int = 9,
) -> tuple[Driver, Branch, Branch]:
    """An older and a younger request of four full blocks each, of eight: one must give way."""
    driver = Driver(
        policy,
        num_device_blocks=9,
        max_model_len=29,
        num_host_blocks=num_host_blocks,
        block_bytes=1000,
    )
    driver.scheduler.set_cost_model(cost_model or CostModel())
    older, younger = (driver.submit(8, max_tokens=20).branches[0] for _ in range(2))
    for _ in range(num_steps):
        driver.step()
    assert not num_preemptions(driver)
    return driver, older, younger


def modes(driver: Driver) -> tuple[int, int]:
    """Preemptions by recomputing, and by swapping."""
    counters = driver.scheduler.snapshot().counters
    return counters.num_preemptions_by_recompute, counters.num_preemptions_by_swap


def resume(driver: Driver, older: Branch, younger: Branch) -> StepPlan:
    """Go on until the younger one runs again; returns the plan that begins its row."""
    while not older.status.is_finished:
        driver.step()
    plan = driver.plan()
    assert younger.status is RequestStatus.RUNNING
    return plan


# ---- whether to swap


@pytest.mark.parametrize("num_host_blocks", [0, 3])
def test_a_host_pool_without_room_means_recompute(num_host_blocks: int) -> None:
    driver, _, younger = pressed(SWAP, num_host_blocks)
    driver.step()
    assert modes(driver) == (1, 0)
    assert not younger.host_block_ids
    driver.run_dry()
    assert len(output_ids(younger)) == 20


# A block costs 4 * 100 ns to compute and 2 * 1000 bytes to move.
@pytest.mark.parametrize(
    ("mode", "bytes_per_s", "expected"),
    [
        (PreemptionMode.AUTO, 1e10, (0, 1)),
        (PreemptionMode.AUTO, 1e9, (1, 0)),
        (PreemptionMode.AUTO, 0.0, (1, 0)),  # not measured yet
        (PreemptionMode.SWAP, 1e9, (0, 1)),
        (PreemptionMode.RECOMPUTE, 1e10, (1, 0)),
    ],
)
def test_the_mode_decides_or_the_price(
    mode: PreemptionMode, bytes_per_s: float, expected: tuple[int, int]
) -> None:
    cost_model = CostModel(token_ns=100.0, swap_bytes_per_s=bytes_per_s)
    driver, _, younger = pressed(Policy(mode), cost_model=cost_model)
    driver.step()
    assert modes(driver) == expected
    driver.run_dry()
    assert len(output_ids(younger)) == 20


def test_prices_outlive_reports_that_know_none() -> None:
    driver, _, _ = pressed(AUTO, cost_model=CostModel(token_ns=100.0, swap_bytes_per_s=1e10))
    driver.scheduler.set_cost_model(CostModel())
    driver.scheduler.set_cost_model(CostModel(swap_bytes_per_s=1e3))  # measured, but no step yet
    driver.step()
    assert modes(driver) == (0, 1)


# ---- out and in again


def test_a_victim_moves_out_without_a_prefix_cache_too() -> None:
    """Its blocks are found by itself alone, and nobody's are kept on the host for later."""
    driver, older, younger = pressed(Policy(PreemptionMode.SWAP, is_caching=False))
    driver.step()
    assert modes(driver) == (0, 1)
    assert resume(driver, older, younger).moves.swap_in
    driver.run_dry()
    assert len(output_ids(younger)) == 20
    counters = driver.scheduler.snapshot().counters
    assert counters.num_swapped_out == 4
    assert younger.request.num_cached_tokens == 0


def test_what_only_the_victim_holds_moves_out_and_is_pinned() -> None:
    driver, _, younger = pressed(num_host_blocks=4)
    table = driver.scheduler.kv.table(younger.row).tolist()
    plan = driver.plan()
    assert younger.status is RequestStatus.WAITING
    assert [src for src, _ in plan.moves.swap_out] == table
    assert sorted(younger.host_block_ids) == sorted(dst for _, dst in plan.moves.swap_out)
    host = driver.scheduler.snapshot().host
    assert (host.num_swapped, host.num_cached, host.num_free) == (16, 0, 0)
    assert driver.scheduler.snapshot().counters.num_swapped_out == 4
    assert not driver.scheduler.kv.host.num_free  # nobody can take them from it


def test_a_victim_comes_back_from_wherever_its_blocks_are() -> None:
    driver, older, younger = pressed()
    plan = driver.step()
    host_ids = [dst for _, dst in plan.moves.swap_out]
    before = driver.scheduler.snapshot().counters
    plan = resume(driver, older, younger)
    new = new_row_of(plan, younger)
    # The older one took the last three of its blocks on the device; the first is still there.
    assert [src for src, _ in plan.moves.swap_in] == host_ids[1:]
    assert [dst for _, dst in plan.moves.swap_in] == new.block_ids.tolist()[1:4]
    assert new.num_computed_tokens == 16
    assert list(plan.num_scheduled_tokens) == [1]
    after = driver.scheduler.snapshot().counters
    assert after.num_hit_tokens_host - before.num_hit_tokens_host == 12
    assert after.num_hit_tokens_device - before.num_hit_tokens_device == 4
    assert after.num_swapped_in == 3
    host = driver.scheduler.snapshot().host
    assert (host.num_swapped, host.num_cached) == (0, 4 * 4 + 3 * 4)  # three more were evicted
    driver.commit()
    driver.run_dry()
    usage = younger.request.blocks
    assert (usage.num_swapped_out, usage.num_swapped_in) == (4, 3)
    assert len(output_ids(younger)) == 20


def test_a_shared_block_stays_where_it_is() -> None:
    driver = Driver(
        SWAP, num_device_blocks=9, max_model_len=29, max_num_batched_tokens=32, num_host_blocks=16
    )
    older, younger = (driver.submit(PROMPT[:12], max_tokens=16).branches[0] for _ in range(2))
    driver.step()
    while not num_preemptions(driver):
        tables = [driver.scheduler.kv.table(b.row).tolist() for b in (older, younger)]
        plan = driver.step()
    assert tables[0][:2] == tables[1][:2]
    assert [src for src, _ in plan.moves.swap_out] == tables[1][2:]
    driver.run_dry()
    assert len(output_ids(younger)) == 16


def test_a_search_moves_out_whole_each_block_once() -> None:
    driver = Driver(SWAP, num_device_blocks=8, max_model_len=29, num_host_blocks=16)
    older = driver.submit(1, max_tokens=27).branches[0]
    search = driver.submit(8, max_tokens=8, beam=WIDTH_2)
    driver.plan()
    driver.commit(scores=PARTING)
    while not num_preemptions(driver):
        plan = driver.plan()
        go_on(driver)
    assert modes(driver) == (0, 1)
    assert len(plan.moves.swap_out) == 4  # the prompt's two, and one of each beam
    driver.scheduler.abort(older.request)
    plan = driver.plan()
    assert [new_row_of(plan, branch).num_computed_tokens for branch in search.branches] == [12, 12]
    assert not driver.scheduler.snapshot().host.num_swapped


def test_a_victim_that_ends_while_it_waits_needs_its_blocks_no_more() -> None:
    driver, _, younger = pressed()
    driver.step()
    driver.scheduler.abort(younger.request)
    host = driver.scheduler.snapshot().host
    assert (host.num_swapped, host.num_cached) == (0, 16)
    driver.run_dry()


def test_what_a_victim_has_on_the_host_outlives_a_flush() -> None:
    driver, older, younger = pressed()
    driver.step()
    num_device_blocks, num_host_blocks = driver.scheduler.flush_cache()
    assert num_device_blocks > 0
    assert num_host_blocks == 0  # pinned
    plan = resume(driver, older, younger)
    assert new_row_of(plan, younger).num_computed_tokens == 16
    assert len(plan.moves.swap_in) == 4
    driver.commit()
    driver.run_dry()
    assert len(output_ids(younger)) == 20


def test_a_victim_that_fails_by_a_step_under_way_leaves_nothing_behind() -> None:
    driver, _, younger = pressed(num_steps=8)
    row = younger.row
    driver.plan()
    driver.plan()
    assert len(younger.host_block_ids) == 4
    (finished,) = driver.commit(failed_rows=[row]).finished
    assert finished.request is younger.request
    host = driver.scheduler.snapshot().host
    assert (host.num_swapped, host.num_cached) == (0, 0)
    driver.commit()
    driver.run_dry()
    assert driver.run(younger.request.prompt.tolist()).num_cached_tokens == 0


# ---- the second tier of the prefix cache


def test_an_evicted_block_comes_back_as_a_host_hit() -> None:
    driver = Driver(RECOMPUTE, num_device_blocks=9, max_model_len=29, num_host_blocks=4)
    driver.run(PROMPT[:8])
    driver.run(28 - 1)  # seven blocks; six were blank
    counters = driver.scheduler.snapshot().counters
    assert (counters.num_evicted, counters.num_swapped_out) == (1, 1)
    request = driver.submit(PROMPT[:9])
    plan = driver.plan()
    assert request.num_cached_tokens == 8
    assert len(plan.moves.swap_in) == 1
    counters = driver.scheduler.snapshot().counters
    assert (counters.num_hit_tokens_device, counters.num_hit_tokens_host) == (4, 4)
    assert request.blocks.num_swapped_in == 1
    driver.commit()
    driver.run_dry()


def test_what_the_host_has_is_not_moved_there_again() -> None:
    driver = Driver(RECOMPUTE, num_device_blocks=9, max_model_len=29, num_host_blocks=16)
    for _ in range(3):
        driver.run(PROMPT[:8])
        driver.run(PROMPT[:1] * 27)
    evicted = driver.scheduler.snapshot().counters
    assert evicted.num_evicted > evicted.num_swapped_out
    pool = driver.scheduler.kv.host
    assert pool.num_cached == evicted.num_swapped_out


def test_an_eviction_without_room_on_the_host_is_final() -> None:
    driver = Driver(RECOMPUTE, num_device_blocks=9, max_model_len=29, num_host_blocks=0)
    driver.run(PROMPT[:8])
    driver.run(27)
    assert driver.scheduler.snapshot().counters.num_evicted == 1
    assert driver.run(PROMPT[:9]).num_cached_tokens == 4


def test_a_full_host_pool_evicts_what_was_used_longest_ago() -> None:
    driver = Driver(RECOMPUTE, num_device_blocks=9, max_model_len=29, num_host_blocks=1)
    driver.run(PROMPT[:8])
    driver.run(28)
    assert driver.scheduler.kv.host.num_cached == 1
    driver.run(27)  # evicts seven more, each of which takes the one place
    assert driver.scheduler.kv.host.num_cached == 1
    assert driver.run(PROMPT[:9]).num_cached_tokens == 0


def test_a_host_block_that_a_plan_writes_is_not_read_by_it() -> None:
    driver = Driver(
        RECOMPUTE,
        num_device_blocks=13,
        max_model_len=29,
        max_num_batched_tokens=32,
        num_host_blocks=8,
    )
    driver.run(PROMPT[:16])
    driver.run(PROMPT[16:32])
    driver.submit(20, max_tokens=1)  # five blocks, of which four are blank: one is evicted
    again = driver.submit(PROMPT[:17], max_tokens=1)
    plan = driver.plan()
    assert len(plan.moves.swap_out) == 3
    assert new_row_of(plan, again.branches[0]).num_computed_tokens == 12
    assert not plan.moves.swap_in
    driver.commit()
    driver.run_dry()


def test_a_prefix_on_the_host_that_makes_way_for_a_victim_is_not_taken_up() -> None:
    driver = Driver(SWAP, num_device_blocks=9, max_num_batched_tokens=64, num_host_blocks=7)
    scheduler, evicting = driver.scheduler, [*PROMPT[:27], 9]
    driver.run(PROMPT[10:26])
    driver.run(evicting)
    oldest, older, youngest = (
        make_request(10, [1, 2], 20),
        make_request(50, [*PROMPT[10:26], 5]),
        make_request(100, evicting, 4),
    )
    driver.requests += [oldest, older, youngest]
    scheduler.submit(oldest)
    scheduler.submit(youngest)
    driver.step()
    assert not scheduler.kv.pool.num_free
    # A lane of a beam search may have its row before there is budget to adopt its prefix.
    residents, (lane,) = scheduler._life.residents, older.branches
    residents.hash_blocks(lane, len(lane.token_ids))
    assert [block.is_on_host for block in scheduler.kv.find(lane)] == [True] * 4
    residents.enter(lane, 0, 0)
    residents.prefilling.append(lane)
    plan = driver.plan()
    assert youngest.branches[0].num_preemptions == 1
    written = {host_id for _, host_id in plan.moves.swap_out}
    assert len(written) == 6
    assert not written & {host_id for host_id, _ in plan.moves.swap_in}
    assert new_row_of(plan, lane).num_computed_tokens == 4  # what is left of the prefix
    driver.commit()
    driver.run_dry()

"""Scenarios of the prefix cache: what is found, by whom, for how long."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler_svc.policy import Policy
from scheduler_svc.request import RequestStatus
from scheduler_svc.tests.driver import EOS, RECOMPUTE, TOKEN, Driver, new_row_of

PROMPT = list(range(10, 42))
"""Eight blocks."""


def num_cached(driver: Driver, prompt: list[int], **fields: Any) -> int:
    """What of this prompt is found now; leaves behind what its request computed."""
    return driver.run(prompt, **fields).num_cached_tokens


# ---- what must not be found


def test_a_prompt_that_nobody_computed_is_not_found() -> None:
    driver = Driver()
    driver.run(PROMPT[:12])
    assert num_cached(driver, PROMPT[1:13]) == 0
    # The same block behind another one is another prefix.
    assert num_cached(driver, [9, 9, 9, 9, *PROMPT[4:12]]) == 0


def test_another_salt_finds_nothing() -> None:
    driver = Driver()
    driver.run(PROMPT[:12], cache_salt=b"one")
    assert num_cached(driver, PROMPT[:12]) == 0
    assert num_cached(driver, PROMPT[:12], cache_salt=b"two") == 0
    assert num_cached(driver, PROMPT[:12], cache_salt=b"one") == 8


def test_a_private_request_finds_nothing_and_is_not_found() -> None:
    driver = Driver()
    driver.run(PROMPT[:12])
    assert num_cached(driver, PROMPT[:12], is_cache_private=True) == 0
    assert num_cached(driver, PROMPT[:12], is_cache_private=True) == 0
    driver = Driver()
    driver.run(PROMPT[:12], is_cache_private=True)
    assert num_cached(driver, PROMPT[:12]) == 0


def test_a_private_salt_is_not_a_salt_that_a_client_can_name() -> None:
    driver = Driver()
    secret = driver.run(PROMPT[:12], is_cache_private=True)
    assert num_cached(driver, PROMPT[:12], cache_salt=secret.key.to_bytes(8, "little")) == 0


def test_without_a_cache_nothing_is_kept() -> None:
    driver = Driver(Policy(is_caching=False))
    driver.run(PROMPT[:12])
    assert num_cached(driver, PROMPT[:12]) == 0
    assert driver.scheduler.snapshot().device.num_cached == 0
    assert not driver.requests[0].branches[0].block_hashes


def test_the_blocks_of_a_failed_row_are_forgotten() -> None:
    driver = Driver()
    bad = driver.submit(PROMPT[:12])
    driver.plan()
    driver.commit(failed_rows=[bad.branches[0].row])
    assert num_cached(driver, PROMPT[:12]) == 0


def test_a_failed_row_makes_what_it_shared_unfindable() -> None:
    driver = Driver()
    driver.run(PROMPT[:12])
    bad = driver.submit(PROMPT[:16])
    driver.plan()
    assert bad.num_cached_tokens == 12
    driver.commit(failed_rows=[bad.branches[0].row])
    assert num_cached(driver, PROMPT[:12]) == 0


@pytest.mark.parametrize("leaves_by_itself", [False, True])
def test_a_row_that_fails_after_its_request_ended_is_forgotten_too(leaves_by_itself: bool) -> None:
    driver = Driver()
    bad = driver.submit(PROMPT[:12])
    row = int(driver.plan().rows[0])
    driver.plan()
    if leaves_by_itself:
        driver.commit(EOS)
    else:
        driver.scheduler.abort(bad)
    assert bad.is_finished
    while driver.scheduler.in_flight:
        assert not driver.commit(failed_rows=[row]).finished
    assert num_cached(driver, PROMPT[:12]) == 0


# ---- what is found


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(3, 0), (4, 0), (5, 4), (11, 8), (12, 8), (13, 12), (20, 12)]
)
def test_hits_are_whole_blocks_and_never_the_last_token(num_tokens: int, expected: int) -> None:
    driver = Driver(max_num_batched_tokens=32)
    driver.run(PROMPT[:12])
    request = driver.submit(PROMPT[:num_tokens])
    plan = driver.plan()
    new = new_row_of(plan, request.branches[0])
    assert new.num_computed_tokens == request.num_cached_tokens == expected
    assert new.token_ids.tolist() == PROMPT[expected:num_tokens]
    assert list(plan.num_scheduled_tokens) == [num_tokens - expected]
    assert len(new.block_ids) == -(-num_tokens // 4)


def test_hits_are_counted_in_tokens() -> None:
    driver = Driver(max_num_batched_tokens=32)
    driver.run(PROMPT[:12])
    driver.run(PROMPT[:20])
    counters = driver.scheduler.snapshot().counters
    assert (counters.num_queried_tokens, counters.num_prompt_tokens) == (32, 32)
    assert (counters.num_hit_tokens_device, counters.num_hit_tokens_host) == (12, 0)


def test_two_requests_of_one_plan_share() -> None:
    driver = Driver(max_num_batched_tokens=32)
    first, second = driver.submit(PROMPT[:14]), driver.submit(PROMPT[:14])
    plan = driver.plan()
    tables = [new_row_of(plan, r.branches[0]).block_ids.tolist() for r in (first, second)]
    assert tables[0][:3] == tables[1][:3]
    assert tables[0][3] != tables[1][3]
    assert list(plan.num_scheduled_tokens) == [14, 2]
    assert driver.scheduler.snapshot().device.num_saved_by_sharing == 12
    assert (first.blocks.num_shared, second.blocks.num_shared) == (0, 3)
    driver.run_dry()


def test_only_what_this_plan_computes_is_shared_not_what_the_next_will() -> None:
    driver = Driver(max_num_batched_tokens=14)
    driver.submit(PROMPT[:20])
    plans = [driver.step()]
    second = driver.submit(PROMPT[:20])
    plans.append(driver.step())
    # The first one's 14 tokens fill three blocks; its other 6, in the second plan, two more.
    assert list(plans[1].num_scheduled_tokens) == [6, 4]
    assert second.num_cached_tokens == 16


@pytest.mark.parametrize(("max_tokens", "expected"), [(3, 4), (4, 8), (7, 8), (8, 12)])
def test_the_next_turn_finds_what_was_generated(max_tokens: int, expected: int) -> None:
    """The last sampled token was never computed."""
    driver = Driver()
    driver.run(PROMPT[:5], max_tokens=max_tokens)
    turn = [*PROMPT[:5], *[TOKEN] * max_tokens, 9, 9, 9, 9]
    assert num_cached(driver, turn) == expected


def test_a_stop_token_is_found_if_a_plan_under_way_computed_it() -> None:
    driver = Driver()
    driver.submit(PROMPT[:7])
    driver.plan()
    driver.plan()
    driver.commit(EOS)
    assert num_cached(driver, [*PROMPT[:7], EOS, 9]) == 8
    driver = Driver()
    driver.submit(PROMPT[:7])
    driver.plan()
    driver.commit(EOS)
    assert num_cached(driver, [*PROMPT[:7], EOS, 9]) == 4


def test_an_aborted_prompt_keeps_what_was_computed() -> None:
    driver = Driver()
    request = driver.submit(PROMPT[:30])
    driver.plan()  # 16 tokens
    driver.scheduler.abort(request)
    driver.run_dry()
    assert num_cached(driver, PROMPT[:30]) == 16


def test_a_private_request_finds_its_own_blocks_again() -> None:
    driver = Driver(RECOMPUTE, num_device_blocks=8, max_model_len=29)
    driver.submit(8, max_tokens=20)
    branch = driver.submit(8, max_tokens=8, is_cache_private=True).branches[0]
    while not branch.num_preemptions:
        driver.step()
    before = driver.scheduler.snapshot().counters.num_hit_tokens_device
    driver.scheduler.abort(driver.requests[0])
    driver.step()
    assert branch.status is RequestStatus.RUNNING
    assert driver.scheduler.snapshot().counters.num_hit_tokens_device - before >= 8
    assert branch.request.num_cached_tokens == 0  # of the prompt, at first admission


# ---- for how long


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    driver.run(PROMPT[:8])
    driver.run(24)
    assert driver.scheduler.snapshot().counters.num_evicted == 0
    assert num_cached(driver, PROMPT[:9]) == 8


@pytest.mark.parametrize(("first_token", "expected"), [(10, 4), (18, 8)])
def test_what_was_used_longest_ago_goes_first_and_its_end_before_its_beginning(
    first_token: int, expected: int
) -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    driver.run(PROMPT[:8])
    driver.run(PROMPT[8:16])
    driver.run(20)  # of eight blocks four are blank
    assert driver.scheduler.snapshot().counters.num_evicted == 1
    assert num_cached(driver, [*range(first_token, first_token + 8), 9]) == expected


def test_a_hit_makes_blocks_young_again() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    first, second = PROMPT[:8], PROMPT[8:16]
    driver.run(first)
    driver.run(second)
    assert num_cached(driver, [*first, 9]) == 8
    driver.run(24)  # evicts two
    assert num_cached(driver, [*first, 9]) == 8
    assert num_cached(driver, [*second, 9]) == 0


def test_held_blocks_are_never_evicted() -> None:
    driver = Driver(num_device_blocks=9, max_model_len=29)
    holder = driver.submit(PROMPT[:12], max_tokens=8)
    driver.step()
    other = driver.submit(20, max_tokens=1)
    driver.run_dry()
    assert [len(r.branches[0].token_ids) for r in (holder, other)] == [20, 21]
    assert num_cached(driver, PROMPT[:12]) == 8


def test_admission_counts_cached_blocks_that_it_would_take_up() -> None:
    """They are free, so whoever takes them up leaves less for the others."""
    driver = Driver(num_device_blocks=9, max_model_len=29)
    driver.run(PROMPT[:16])
    driver.submit(16)
    driver.step()
    waiting = driver.submit(PROMPT[:20])  # four cached blocks and one more, of four free ones
    assert not driver.step().new_rows
    assert list(driver.scheduler.waiting) == waiting.branches


def test_flush_forgets_what_is_cached_and_not_what_is_held() -> None:
    driver = Driver()
    driver.run(PROMPT[:12])
    running = driver.submit(PROMPT[12:24])
    driver.step()
    assert driver.scheduler.flush_cache() == (3, 0)
    assert driver.scheduler.snapshot().device.num_cached == 0
    driver.run_dry()
    assert running.branches[0].status is RequestStatus.FINISHED_LENGTH
    assert num_cached(driver, PROMPT[:12]) == 0
    assert num_cached(driver, PROMPT[12:24]) == 8

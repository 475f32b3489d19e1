"""The random walk can fail: it catches every known shape of bug within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from executor_svc.plan import PlanError
from integration_tests import bug_shapes as bugs
from integration_tests.random_walk import Walk
from integration_tests.walk_request import OutputMismatchError

MAX_SEEDS: Final = 60

# What gives each bug away: a wrong token, the executor's plan_check, or an assertion.
SHAPES: Final[list[tuple[Callable[[pytest.MonkeyPatch], None], type[Exception]]]] = [
    (bugs.block_released_while_in_use, OutputMismatchError),
    (bugs.block_released_twice, OutputMismatchError),
    (bugs.block_appended_late, PlanError),
    (bugs.uncomputed_token_published, OutputMismatchError),
    (bugs.preempted_row_taken_for_computed, OutputMismatchError),
    (bugs.append_missing_in_plan, PlanError),
    (bugs.appends_exchanged, OutputMismatchError),
    (bugs.freed_row_not_told, PlanError),
    (bugs.seed_lost_at_readmission, OutputMismatchError),
    (bugs.other_batch_taken_for_the_same, PlanError),
    (bugs.token_under_way_not_published, OutputMismatchError),
    (bugs.token_under_way_not_kept, OutputMismatchError),
    (bugs.token_given_to_next_resident, OutputMismatchError),
    (bugs.readmitted_before_token_came, OutputMismatchError),
    (bugs.failed_row_published, OutputMismatchError),
    (bugs.oldest_preempted, AssertionError),
    (bugs.epoch_not_reset, PlanError),
    (bugs.table_entry_left_stale, OutputMismatchError),
    (bugs.append_missed_by_executor, OutputMismatchError),
    (bugs.decode_position_off_by_one, OutputMismatchError),
    (bugs.resent_plan_applied_again, PlanError),
    (bugs.result_kept_out_of_date, OutputMismatchError),
]


def seeds_until(expected: type[Exception]) -> int:
    """How many seeds it takes until a walk fails that way; failures of another kind do not count.

    The pool's books are not looked at: what the executor reads and is told must show the bug.
    """
    for seed in range(MAX_SEEDS):
        try:
            Walk(seed, checks_pool=False).run()
        except expected:
            return seed + 1
        except (AssertionError, PlanError):
            continue
    pytest.fail(f"not caught in {MAX_SEEDS} seeds")


@pytest.mark.parametrize(("inject", "expected"), SHAPES, ids=lambda v: getattr(v, "__name__", None))
def test_the_walk_catches(
    inject: Callable[[pytest.MonkeyPatch], None],
    expected: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inject(monkeypatch)
    assert seeds_until(expected) <= MAX_SEEDS


@pytest.mark.parametrize("inject", [bugs.block_released_while_in_use, bugs.block_released_twice])
def test_the_books_alone_catch_it_too(
    inject: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        _walk_all()
    assert caught.traceback[-1].frame.code.name == "check_conservation"


def _walk_all() -> None:
    for seed in range(MAX_SEEDS):
        Walk(seed).run()

"""The random walk can fail: it catches every known shape of bug within a few seeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest

from executor_svc.plan import PlanError
from integration_tests import bug_shapes as bugs
from integration_tests import bug_shapes_memory as memory_bugs
from integration_tests.random_walk import Walk
from integration_tests.walk_request import OutputMismatchError
from scheduler_svc.scheduler import StuckError

MAX_SEEDS: Final = 60


@dataclass(frozen=True, slots=True)
class Shape:
    """A bug, and what gives it away: a wrong token, the executor's plan_check, or an assertion."""

    inject: Callable[[pytest.MonkeyPatch], None]
    error: type[Exception]
    says: str = ""  # in the error's text
    first_seed: int = 0  # near the first one that shows it, which saves time


SHAPES: Final = (
    Shape(bugs.block_released_while_in_use, OutputMismatchError),
    Shape(bugs.block_released_twice, OutputMismatchError),
    Shape(bugs.block_appended_late, PlanError, "exceed the blocks"),
    Shape(bugs.uncomputed_token_published, OutputMismatchError),
    Shape(bugs.preempted_row_taken_for_computed, OutputMismatchError),
    Shape(bugs.append_missing_in_plan, PlanError, "exceed the blocks"),
    Shape(bugs.appends_exchanged, OutputMismatchError),
    Shape(bugs.freed_row_not_told, PlanError, "row is live"),
    Shape(bugs.seed_lost_at_readmission, OutputMismatchError),
    Shape(bugs.other_batch_taken_for_the_same, PlanError, "not live"),
    Shape(bugs.token_under_way_not_published, OutputMismatchError),
    Shape(bugs.token_under_way_not_kept, OutputMismatchError),
    Shape(bugs.token_given_to_next_resident, OutputMismatchError),
    Shape(bugs.readmitted_before_token_came, OutputMismatchError, first_seed=15),
    Shape(bugs.failed_row_published, OutputMismatchError),
    Shape(bugs.oldest_preempted, AssertionError, "the oldest was preempted"),
    Shape(bugs.epoch_not_reset, PlanError, "not live"),
    Shape(bugs.table_entry_left_stale, OutputMismatchError),
    Shape(bugs.append_missed_by_executor, OutputMismatchError),
    Shape(bugs.decode_position_off_by_one, OutputMismatchError),
    Shape(bugs.resent_plan_applied_again, PlanError, "beyond the known tokens", first_seed=160),
    Shape(bugs.result_kept_out_of_date, OutputMismatchError),
    # The memory manager's.
    Shape(memory_bugs.block_named_before_it_is_full, OutputMismatchError, first_seed=80),
    Shape(memory_bugs.uncomputed_block_named, OutputMismatchError, first_seed=15),
    Shape(memory_bugs.hit_includes_the_last_token, StuckError, "for nothing"),
    Shape(memory_bugs.hit_goes_on_behind_a_hole, OutputMismatchError, first_seed=15),
    Shape(memory_bugs.name_kept_after_eviction, OutputMismatchError),
    Shape(memory_bugs.host_name_kept_after_eviction, OutputMismatchError, first_seed=20),
    Shape(memory_bugs.salt_ignored, AssertionError, "another salt"),
    Shape(memory_bugs.failed_blocks_still_found, AssertionError, "can be found"),
    Shape(memory_bugs.tail_never_copied, OutputMismatchError),
    Shape(memory_bugs.tail_copied_too_late, OutputMismatchError),
    Shape(memory_bugs.tail_copied_too_early, OutputMismatchError),
    Shape(memory_bugs.fork_keeps_the_old_tail, OutputMismatchError),
    Shape(memory_bugs.beam_inputs_exchanged, OutputMismatchError),
    Shape(memory_bugs.lane_released_though_its_beam_lives, PlanError, "copy"),
    Shape(memory_bugs.preempted_beam_keeps_its_state, PlanError, "exceed the blocks"),
    Shape(memory_bugs.branch_index_lost, OutputMismatchError),
    Shape(memory_bugs.shared_block_released_twice, OutputMismatchError),
    Shape(memory_bugs.swap_in_forgotten, OutputMismatchError),
    Shape(memory_bugs.swapped_out_too_late, OutputMismatchError),
    Shape(memory_bugs.swap_pairs_mixed_up, OutputMismatchError),
    Shape(memory_bugs.host_block_read_while_written, PlanError, "swap_in source"),
    Shape(memory_bugs.host_block_reused_while_read, PlanError, "swap_in source", first_seed=15),
)


def is_caught(shape: Shape) -> bool:
    """Whether a walk fails the shape's way; failures of another kind do not count.

    The pool's books are not looked at: what the executor reads and is told must show the bug.
    """
    for seed in range(shape.first_seed, shape.first_seed + MAX_SEEDS):
        try:
            Walk(seed, checks_pool=False).run()
        except (AssertionError, PlanError, LookupError) as error:
            if isinstance(error, shape.error) and re.search(shape.says, str(error)):
                return True
    return False


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.inject.__name__)
def test_the_walk_catches(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    shape.inject(monkeypatch)
    assert is_caught(shape), f"not in {MAX_SEEDS} seeds"


@pytest.mark.parametrize(
    "inject",
    [
        bugs.block_released_while_in_use,
        bugs.block_released_twice,
        memory_bugs.lane_released_though_its_beam_lives,
        memory_bugs.shared_block_released_twice,
    ],
)
def test_the_books_alone_catch_it_too(
    inject: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        _walk_all()
    # The check after each step, or the pool itself, to which nobody can give back what is free.
    assert caught.traceback[-1].frame.code.name in ("check_conservation", "release")


def _walk_all() -> None:
    for seed in range(MAX_SEEDS):
        Walk(seed).run()

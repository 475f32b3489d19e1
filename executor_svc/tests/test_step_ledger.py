"""Step ids of an epoch: what runs, what is resent, what is refused."""

from __future__ import annotations

import pytest

from blockyard.common.protocol import KEPT_RESULTS, MAX_WINDOW
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import PlanError
from executor_svc.step_ledger import StepLedger


@pytest.fixture
def ledger() -> StepLedger:
    ledger = StepLedger()
    ledger.begin_epoch()
    return ledger


def run(ledger: StepLedger, *step_ids: int) -> None:
    for step_id in step_ids:
        assert ledger.accept(ledger.epoch, step_id)
        assert ledger.complete(pb.StepResult(epoch=ledger.epoch, step_id=step_id))


def test_epochs_increase_strictly_even_when_the_clock_does_not(
    ledger: StepLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ledger.epoch
    monkeypatch.setattr("executor_svc.step_ledger.time.time_ns", lambda: first - 1_000)
    assert ledger.begin_epoch() == first + 1
    ledger.end_epoch()
    assert ledger.begin_epoch() == first + 2


def test_a_later_process_has_later_epochs(ledger: StepLedger) -> None:
    assert StepLedger().begin_epoch() > ledger.epoch


def test_steps_are_consecutive_from_one(ledger: StepLedger) -> None:
    with pytest.raises(PlanError, match="gap"):
        ledger.accept(ledger.epoch, 2)
    run(ledger, 1, 2)
    assert (ledger.applied_step_id, ledger.completed_step_id) == (2, 2)


def test_a_repeated_plan_does_not_run_again(ledger: StepLedger) -> None:
    run(ledger, 1)
    assert ledger.accept(ledger.epoch, 2)
    assert not ledger.accept(ledger.epoch, 2)  # under way: its result will come
    assert ledger.kept(2) is None
    assert not ledger.accept(ledger.epoch, 1)
    kept = ledger.kept(1)
    assert kept is not None
    assert kept.step_id == 1


def test_no_more_plans_than_the_widest_window(ledger: StepLedger) -> None:
    run(ledger, 1)
    for step_id in range(2, MAX_WINDOW + 2):
        assert ledger.accept(ledger.epoch, step_id)
    with pytest.raises(PlanError, match="under way"):
        ledger.accept(ledger.epoch, MAX_WINDOW + 2)
    assert ledger.applied_step_id == MAX_WINDOW + 1  # nothing is lost
    assert ledger.complete(pb.StepResult(epoch=ledger.epoch, step_id=2))
    assert ledger.accept(ledger.epoch, MAX_WINDOW + 2)


def test_the_last_results_are_kept(ledger: StepLedger) -> None:
    run(ledger, *range(1, KEPT_RESULTS + 3))
    assert [r.step_id for r in ledger.kept_after(4)] == [5, 6]
    assert [r.step_id for r in ledger.kept_after(0)] == [3, 4, 5, 6]
    with pytest.raises(PlanError, match="no longer kept"):
        ledger.accept(ledger.epoch, 2)
    with pytest.raises(PlanError, match="no longer kept"):
        ledger.accept(ledger.epoch, 0)


def test_other_epochs_are_refused(ledger: StepLedger) -> None:
    old = ledger.epoch
    run(ledger, 1)
    ledger.begin_epoch()
    with pytest.raises(PlanError, match="epoch"):
        ledger.accept(old, 2)
    assert not ledger.complete(pb.StepResult(epoch=old, step_id=1))
    assert ledger.completed_step_id == 0
    ledger.end_epoch()
    with pytest.raises(PlanError, match="epoch"):
        ledger.accept(0, 1)


def test_a_withdrawn_plan_may_come_again(ledger: StepLedger) -> None:
    run(ledger, 1)
    assert ledger.accept(ledger.epoch, 2)
    assert ledger.accept(ledger.epoch, 3)
    ledger.withdraw(2)
    assert ledger.accept(ledger.epoch, 2)
    ledger.withdraw(3)  # the answer to the one that was queued behind
    assert ledger.applied_step_id == 2


def test_resuming_needs_every_missing_result(ledger: StepLedger) -> None:
    epoch = ledger.epoch
    assert ledger.can_resume(epoch, 0)
    run(ledger, *range(1, 7))
    assert not ledger.can_resume(epoch, 1)
    assert ledger.can_resume(epoch, 2)
    assert ledger.can_resume(epoch, 6)
    assert not ledger.can_resume(epoch, 7)
    assert not ledger.can_resume(epoch + 1, 6)
    assert not ledger.can_resume(0, 0)
    ledger.end_epoch()
    assert not ledger.can_resume(epoch, 6)
    assert not ledger.can_resume(0, 0)

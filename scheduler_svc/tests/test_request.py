from __future__ import annotations

import itertools

import pytest

from scheduler_svc.beam import BeamParams
from scheduler_svc.request import MAX_BRANCHES, TRANSITIONS, RequestStatus
from scheduler_svc.tests.driver import make_request


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestStatus, repeat=2)))
def test_only_legal_transitions(old: RequestStatus, new: RequestStatus) -> None:
    (branch,) = make_request(1).branches
    branch.status = old
    if new in TRANSITIONS[old]:
        branch.move_to(new)
        assert branch.status is new
    else:
        with pytest.raises(AssertionError):
            branch.move_to(new)


def test_nothing_leaves_a_finished_status() -> None:
    assert all(not TRANSITIONS[status] for status in RequestStatus if status.is_finished)
    assert not RequestStatus.WAITING.is_finished
    assert not RequestStatus.RUNNING.is_finished


def test_a_branch_runs_for_each_sample_or_beam() -> None:
    plain, samples = make_request(1), make_request(2, num_samples=3)
    beams = make_request(3, beam=BeamParams(4))
    assert [len(request.branches) for request in (plain, samples, beams)] == [1, 3, 4]
    # Samples enter one by one, the lanes of a search together.
    assert [request.width for request in (plain, samples, beams)] == [1, 1, 4]
    assert [branch.index for branch in beams.branches] == [0, 1, 2, 3]


def test_branches_are_served_in_order_of_request_then_index() -> None:
    branches = [b for key in (1, 2) for b in make_request(key, num_samples=MAX_BRANCHES).branches]
    keys = [branch.key for branch in branches]
    assert keys == sorted(set(keys))


def test_a_request_is_over_when_all_its_branches_are() -> None:
    request = make_request(1, num_samples=2)
    for branch in request.branches:
        assert not request.is_finished
        branch.move_to(RequestStatus.FINISHED_ABORTED)
    assert request.is_finished


def test_who_shares_blocks_depends_on_salt_and_privacy() -> None:
    plain = [make_request(key).cache_root for key in (1, 2)]
    salted = [make_request(key, cache_salt=b"s").cache_root for key in (1, 2)]
    private = [make_request(key, is_cache_private=True).cache_root for key in (1, 2)]
    assert (len(set(plain)), len(set(salted)), len(set(private))) == (1, 1, 2)
    assert len({*plain, *salted, *private}) == 4


@pytest.mark.parametrize(("num_suspicions", "expected"), [(0, False), (1, False), (2, True)])
def test_two_suspicions_mean_alone(num_suspicions: int, expected: bool) -> None:
    (branch,) = make_request(1).branches
    branch.num_suspicions = num_suspicions
    assert branch.must_run_alone is expected

import itertools

import numpy as np
import pytest

from scheduler_svc.policy import WaitingQueue, needs_reservation, pick_victim
from scheduler_svc.request import TRANSITIONS, Request, RequestStatus


def make(key: int, **fields: int) -> Request:
    request = Request(
        key=key,
        frontend=0,
        request_id=key,
        token_ids=np.array([1], np.int32),
        num_prompt_tokens=1,
        max_total_tokens=9,
        arrival_ns=0,
    )
    for name, value in fields.items():
        setattr(request, name, value)
    return request


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestStatus, repeat=2)))
def test_only_legal_transitions(old: RequestStatus, new: RequestStatus) -> None:
    request = make(1)
    request.status = old
    if new in TRANSITIONS[old]:
        request.move_to(new)
        assert request.status is new
    else:
        with pytest.raises(AssertionError):
            request.move_to(new)


def test_nothing_leaves_a_finished_status() -> None:
    assert all(not TRANSITIONS[status] for status in RequestStatus if status.is_finished)


def test_victim_is_the_youngest_and_never_older() -> None:
    requests = [make(key) for key in (3, 7, 5)]
    assert pick_victim(requests, make(4)) is requests[1]
    assert pick_victim(requests, make(8)) is None
    assert pick_victim(requests, requests[1]) is None


def test_reserved_requests_are_victims_last() -> None:
    reserved = make(9, num_preemptions=2)
    assert needs_reservation(reserved)
    other = make(6)
    assert pick_victim([reserved, other], make(1)) is other
    assert pick_victim([reserved], make(1)) is reserved


def test_queue_returns_preempted_requests_to_their_place() -> None:
    queue = WaitingQueue()
    for key in (4, 5, 2):
        queue.push(make(key))
    assert [queue.pop().key for _ in range(3)] == [2, 4, 5]


def test_queue_skips_requests_that_ended() -> None:
    queue = WaitingQueue()
    first, second = make(1), make(2)
    queue.push(first)
    queue.push(second)
    first.move_to(RequestStatus.FINISHED_ABORTED)
    queue.discard(first)
    assert len(queue) == 1
    assert list(queue) == [second]
    assert queue.pop() is second
    assert queue.peek() is None

from __future__ import annotations

import dataclasses

import pytest

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.accounting import Counters, DevicePool, HostPool
from scheduler_svc.beam import BeamParams
from scheduler_svc.engine.reports import finish_message, snapshot_message
from scheduler_svc.request import BlockUsage, Request, RequestStatus
from scheduler_svc.step_plan import Finished
from scheduler_svc.tests.driver import Driver, make_request


def ended(request: Request, branch: int = 0, *, is_last: bool = True) -> pb.Finish:
    """The report of a branch that got its longest output."""
    status = RequestStatus.FINISHED_LENGTH
    return finish_message(Finished(request, branch, status, 8, is_last=is_last))


@pytest.mark.parametrize(
    "status", [RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.FINISHED_ABORTED]
)
def test_what_has_not_ended_or_has_nobody_to_tell_is_not_reported(status: RequestStatus) -> None:
    with pytest.raises(KeyError):
        finish_message(Finished(make_request(1), 0, status, 0))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (RequestStatus.FINISHED_STOP, pb.FINISH_REASON_STOP),
        (RequestStatus.FINISHED_LENGTH, pb.FINISH_REASON_LENGTH),
        (RequestStatus.FINISHED_ERROR, pb.FINISH_REASON_ERROR),
    ],
)
def test_why_a_branch_ended(status: RequestStatus, reason: int) -> None:
    message = finish_message(
        Finished(make_request(9, num_samples=2), 1, status, 3, error_message="why", score=-1.5)
    )
    assert (message.request_id, message.branch, message.reason) == (9, 1, reason)
    assert (message.num_output_tokens, message.error_message, message.score) == (3, "why", -1.5)
    assert not message.HasField("stop_token_id")


def test_token_zero_may_be_what_stopped_it() -> None:
    finished = Finished(make_request(1), 0, RequestStatus.FINISHED_STOP, 3, stop_token_id=0)
    message = finish_message(finished)
    assert message.HasField("stop_token_id")
    assert message.stop_token_id == 0


def test_prompt_cache_and_queue() -> None:
    request = make_request(1, range(5), arrival_ns=100)
    request.first_admitted_ns, request.num_cached_tokens = 350, 4
    message = ended(request)
    assert (message.num_prompt_tokens, message.num_cached_tokens) == (5, 4)
    assert message.queue_ns == 250


def test_a_request_that_never_ran_has_no_queueing_time() -> None:
    assert ended(make_request(1, arrival_ns=100)).queue_ns == 0


def test_usage_comes_with_the_last_branch_only() -> None:
    request = make_request(1, num_samples=2)
    request.blocks = BlockUsage(2_500_000_000, 3, 4, 5, 6)
    assert not ended(request, is_last=False).HasField("blocks")
    blocks = ended(request, branch=1).blocks
    assert blocks.block_seconds == 2.5
    assert (blocks.num_shared, blocks.num_copied) == (3, 4)
    assert (blocks.num_swapped_out, blocks.num_swapped_in) == (5, 6)


def test_samples_are_preempted_one_by_one_and_lanes_together() -> None:
    samples, beams = make_request(1, num_samples=2), make_request(2, beam=BeamParams(2))
    for branch in (*samples.branches, *beams.branches):
        branch.num_preemptions, branch.num_recoveries = 2, 1
    assert (ended(samples).num_preemptions, ended(samples).num_recoveries) == (4, 1)
    assert (ended(beams).num_preemptions, ended(beams).num_recoveries) == (2, 1)


def test_a_snapshot_is_the_schedulers_state_between_two_steps() -> None:
    driver = Driver(num_host_blocks=3, max_num_seqs=2)
    driver.run(9)
    for _ in range(3):
        driver.submit(5)
    driver.plan()
    message = snapshot_message(driver.scheduler)
    accounting = driver.scheduler.snapshot()
    assert (message.epoch, message.step_id) == (1, driver.scheduler.last_step_id)
    assert (message.num_running, message.num_waiting, message.block_size) == (2, 1, 4)
    assert message.device.num_in_flight == 10
    assert message.device.num_cached == 8
    for part, values in (
        (message.device, accounting.device),
        (message.host, accounting.host),
        (message.counters, accounting.counters),
    ):
        assert {f.name: getattr(part, f.name) for f in part.DESCRIPTOR.fields} == (
            dataclasses.asdict(values)
        )


@pytest.mark.parametrize(
    ("message", "values"),
    [(pb.DevicePool, DevicePool), (pb.HostPool, HostPool), (pb.Counters, Counters)],
)
def test_the_contract_has_every_class_that_is_counted(message: type, values: type) -> None:
    in_contract = {field.name for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]
    assert in_contract == {field.name for field in dataclasses.fields(values)}

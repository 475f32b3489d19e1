"""What the engine tells of a branch that ended, and of its pools, as protobufs."""

from __future__ import annotations

import dataclasses
from typing import Final

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Finished

_REASONS: Final = {
    RequestStatus.FINISHED_STOP: pb.FINISH_REASON_STOP,
    RequestStatus.FINISHED_LENGTH: pb.FINISH_REASON_LENGTH,
    RequestStatus.FINISHED_ERROR: pb.FINISH_REASON_ERROR,
}


def finish_message(finished: Finished) -> pb.Finish:
    """The end of a branch; with the usage of the whole request if that is over."""
    request = finished.request
    # Lanes of a beam search are preempted and recovered together.
    merge = max if request.beam is not None else sum
    message = pb.Finish(
        request_id=request.request_id,
        branch=finished.branch,
        reason=_REASONS[finished.status],
        stop_token_id=finished.stop_token_id,
        error_message=finished.error_message,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=finished.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_preemptions=merge(branch.num_preemptions for branch in request.branches),
        num_recoveries=max(branch.num_recoveries for branch in request.branches),
        queue_ns=max(0, request.first_admitted_ns - request.arrival_ns),
        score=finished.score,
    )
    if finished.is_last:
        message.blocks.CopyFrom(_block_usage(request))
    return message


def _block_usage(request: Request) -> pb.BlockUsage:
    blocks = request.blocks
    return pb.BlockUsage(
        block_seconds=blocks.held_block_ns / 1e9,
        num_shared=blocks.num_shared,
        num_copied=blocks.num_copied,
        num_swapped_out=blocks.num_swapped_out,
        num_swapped_in=blocks.num_swapped_in,
    )


def snapshot_message(scheduler: Scheduler) -> pb.SnapshotResponse:
    """Queues and pools between two steps."""
    accounting = scheduler.snapshot()
    return pb.SnapshotResponse(
        epoch=scheduler.epoch,
        step_id=scheduler.last_step_id,
        num_waiting=len(scheduler.waiting),
        num_running=len(scheduler.running),
        block_size=scheduler.limits.block_size,
        device=pb.DevicePool(**dataclasses.asdict(accounting.device)),
        host=pb.HostPool(**dataclasses.asdict(accounting.host)),
        counters=pb.Counters(**dataclasses.asdict(accounting.counters)),
        num_deferred=scheduler.num_deferred,
        num_waiting_tokens=scheduler.waiting.num_prompt_tokens,
        estimated_wait_ns=int(scheduler.estimated_wait_ns()),
    )

"""StepPlan and StepResult <-> protobuf columns. The only file that knows both."""

from __future__ import annotations

import numpy as np

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc.step_plan import NewRow, StepPlan, StepTokens


def encode(plan: StepPlan) -> pb.StepPlan:
    """The plan as the executor reads it. Steady decode costs a few appends and nothing else."""
    message = pb.StepPlan(epoch=plan.epoch, step_id=plan.step_id, freed_rows=plan.freed_rows)
    if plan.new_rows:
        _encode_new_rows(plan.new_rows, message.new_rows)
    if plan.append_rows:
        message.appends.rows.extend(plan.append_rows)
        if any(count != 1 for count in plan.append_counts):
            message.appends.counts.extend(plan.append_counts)
        for block_ids in plan.append_block_ids:
            message.appends.block_ids.extend(block_ids.tolist())
    if plan.same_batch:
        message.batch.same = True
    elif len(plan.rows):
        message.batch.rows.extend(plan.rows.tolist())
        message.batch.num_decode_rows = plan.num_decode_rows
        if plan.num_scheduled_tokens:
            message.batch.num_scheduled_tokens.extend([1] * plan.num_decode_rows)
            message.batch.num_scheduled_tokens.extend(plan.num_scheduled_tokens)
    return message


def _encode_new_rows(new_rows: list[NewRow], message: pb.NewRows) -> None:
    requests = [new.request for new in new_rows]
    sampling = [request.sampling for request in requests]
    message.rows.extend(new.row for new in new_rows)
    message.request_keys.extend(request.key for request in requests)
    message.num_tokens.extend(new.num_computed_tokens + len(new.token_ids) for new in new_rows)
    message.num_prompt_tokens.extend(request.num_prompt_tokens for request in requests)
    message.token_ids = pack_u32(np.concatenate([new.token_ids for new in new_rows]))
    message.block_counts.extend(len(new.block_ids) for new in new_rows)
    message.block_ids = pack_u32(np.concatenate([new.block_ids for new in new_rows]))
    message.seeds.extend(s.seed for s in sampling)
    if any(new.num_computed_tokens for new in new_rows):
        message.num_computed_tokens.extend(new.num_computed_tokens for new in new_rows)
    if any(s.temperature for s in sampling):
        message.temperature.extend(s.temperature for s in sampling)
        message.top_k.extend(s.top_k for s in sampling)
        message.top_p.extend(s.top_p for s in sampling)
        message.min_p.extend(s.min_p for s in sampling)


def decode(message: pb.StepResult) -> StepTokens:
    """The result's tokens [num_samples], in plan order."""
    return StepTokens(
        message.epoch,
        message.step_id,
        np.fromiter(message.token_ids, np.int32, len(message.token_ids)),
        frozenset(message.failed_rows),
    )

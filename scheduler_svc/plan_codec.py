"""StepPlan and StepResult <-> protobuf columns. The only file that knows both."""

from __future__ import annotations

import numpy as np

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc.step_plan import NewRow, StepPlan, StepTokens


def encode(plan: StepPlan) -> pb.StepPlan:
    """The plan as the executor reads it. Steady decode costs a few appends and nothing else."""
    message = pb.StepPlan(epoch=plan.epoch, step_id=plan.step_id, freed_rows=plan.freed_rows)
    if plan.moves:
        _encode_pairs(plan.moves.swap_out, message.swap_out)
        _encode_pairs(plan.moves.copy, message.copy)
        _encode_pairs(plan.moves.swap_in, message.swap_in)
    if plan.forks:
        src_rows, dst_rows, tail_block_ids = zip(*plan.forks, strict=True)
        message.forks.src_rows.extend(src_rows)
        message.forks.dst_rows.extend(dst_rows)
        message.forks.tail_dst_block_ids.extend(tail_block_ids)
    if plan.new_rows:
        _encode_new_rows(plan.new_rows, message.new_rows)
    if plan.append_rows:
        message.appends.rows.extend(plan.append_rows)
        if any(count != 1 for count in plan.append_counts):
            message.appends.counts.extend(plan.append_counts)
        for block_ids in plan.append_block_ids:
            message.appends.block_ids.extend(block_ids.tolist())
    if plan.inputs:
        rows, token_ids = zip(*plan.inputs, strict=True)
        message.inputs.rows.extend(rows)
        message.inputs.token_ids.extend(token_ids)
    if plan.same_batch:
        message.batch.same = True
    elif len(plan.rows):
        message.batch.rows.extend(plan.rows.tolist())
        message.batch.num_decode_rows = plan.num_decode_rows
        if plan.num_scheduled_tokens:
            message.batch.num_scheduled_tokens.extend([1] * plan.num_decode_rows)
            message.batch.num_scheduled_tokens.extend(plan.num_scheduled_tokens)
    return message


def _encode_pairs(pairs: list[tuple[int, int]], message: pb.BlockPairs) -> None:
    message.src.extend(src for src, _ in pairs)
    message.dst.extend(dst for _, dst in pairs)


def _encode_new_rows(new_rows: list[NewRow], message: pb.NewRows) -> None:
    branches = [new.branch for new in new_rows]
    requests = [branch.request for branch in branches]
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
    if any(branch.index for branch in branches):
        message.branches.extend(branch.index for branch in branches)
    if any(s.temperature for s in sampling):
        message.temperature.extend(s.temperature for s in sampling)
        message.top_k.extend(s.top_k for s in sampling)
        message.top_p.extend(s.top_p for s in sampling)
        message.min_p.extend(s.min_p for s in sampling)
    if any(request.beam is not None for request in requests):
        driven = pb.ROW_FLAG_DRIVEN
        message.flags.extend(driven if r.beam is not None else 0 for r in requests)
    if any(new.num_candidates for new in new_rows):
        message.num_candidates.extend(new.num_candidates for new in new_rows)
    if any(new.logits_from is not None for new in new_rows):
        message.logits_from.extend(
            0 if new.logits_from is None else new.logits_from + 1 for new in new_rows
        )


def decode(message: pb.StepResult) -> StepTokens:
    """The result's tokens [num_samples], in plan order."""
    token_ids = np.fromiter(message.token_ids, np.int32, len(message.token_ids))
    failed_rows = frozenset(message.failed_rows)
    if not message.candidate_token_ids:
        return StepTokens(message.epoch, message.step_id, token_ids, failed_rows)
    return StepTokens(
        message.epoch,
        message.step_id,
        token_ids,
        failed_rows,
        np.array(message.candidate_token_ids, np.int32),
        np.array(message.candidate_logprobs, np.float32),
        np.array(message.token_logprobs, np.float32),
    )

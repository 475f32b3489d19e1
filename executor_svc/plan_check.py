"""Validates a whole plan before anything of it is applied. Pure: reads the rows, changes nothing.

Only the lengths that decide legality are followed through the plan (`_Rows`), in the order in
which the plan is applied; tables and tokens are not. Sharing blocks between rows is legal, so an
id in several tables is no error; an id handed out twice by one plan is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import NewRows, Plan, PlanError, U32Array
from executor_svc.row_state import RowState
from executor_svc.runner import RunnerInfo

MAX_CANDIDATES: Final = 64
"""Most top candidates that a row may ask for."""

_KNOWN_FLAGS: Final = pb.ROW_FLAG_HISTORY | pb.ROW_FLAG_DRIVEN

_Array = npt.NDArray[Any]


@dataclass(slots=True)
class _Rows:
    """The rows as the parts of the plan checked so far leave them; columns [max_rows]."""

    is_live: npt.NDArray[np.bool_]
    is_driven: npt.NDArray[np.bool_]
    num_blocks: npt.NDArray[np.int32]
    num_computed_tokens: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int32]


def check(plan: Plan, state: RowState, limits: RunnerInfo) -> None:
    """Raise PlanError unless `plan` may be applied to `state` as it stands.

    Args:
        plan: decoded; its epoch and step id are the step worker's business.
        state: the rows after the plan before. Not changed.
        limits: sizes of pools, rows, vocabulary and batch.
    """
    rows = _Rows(
        state.is_live.copy(),
        state.flags & pb.ROW_FLAG_DRIVEN != 0,
        state.num_blocks.copy(),
        state.num_computed_tokens.copy(),
        state.num_tokens.copy(),
    )
    max_blocks_per_row = state.block_table.shape[1]
    _check_moves(plan, limits)
    if plan.freed_rows.size:
        _check_freed(plan.freed_rows, rows)
    if plan.fork_src_rows.size:
        _check_forks(plan, rows, limits)
    if plan.new_rows.rows.size:
        _check_new_rows(plan.new_rows, rows, limits, max_blocks_per_row)
    if plan.append_rows.size:
        _check_appends(plan, rows, limits, max_blocks_per_row)
    if plan.input_rows.size:
        _check_inputs(plan, rows, limits)
    _check_batch(plan, state.batch_rows, rows, limits)


def _check_moves(plan: Plan, limits: RunnerInfo) -> None:
    out, copy, into = plan.swap_out, plan.copy, plan.swap_in
    if not (out.src.size or copy.src.size or into.src.size):
        return
    for name, pairs in (("swap_out", out), ("copy", copy), ("swap_in", into)):
        _check_unique(pairs.dst, f"{name}: destination twice")
    for name, pairs in (("swap_out", out), ("swap_in", into)):
        host_ids = pairs.dst if pairs is out else pairs.src
        _refuse(host_ids >= limits.num_host_blocks, host_ids, f"{name}: not a host block")
    for name, ids in (
        ("swap_out", out.src),
        ("copy", copy.src),
        ("copy", copy.dst),
        ("swap_in", into.dst),
    ):
        _check_device_ids(ids, name, limits)
    _check_disjoint(out.dst, into.src, "swap_out destination is a swap_in source")
    _check_disjoint(copy.src, copy.dst, "copy source is a copy destination")
    _check_disjoint(copy.src, into.dst, "copy source is a swap_in destination")


def _check_freed(freed: U32Array, rows: _Rows) -> None:
    _check_live(freed, "freed_rows", rows)
    _check_unique(freed, "freed_rows: row twice")
    rows.is_live[freed] = False


def _check_forks(plan: Plan, rows: _Rows, limits: RunnerInfo) -> None:
    src, dst, tails = plan.fork_src_rows, plan.fork_dst_rows, plan.fork_tail_dst_block_ids
    _check_live(src, "forks.src_rows", rows)
    _check_range(dst, "forks.dst_rows", rows)
    _check_unique(dst, "forks.dst_rows: row twice")
    # Other rows' next input is on the device and a fork does not carry it.
    _refuse(~rows.is_driven[src], src, "forks.src_rows: row is not driven")
    _refuse(rows.is_live[dst] & ~rows.is_driven[dst], dst, "forks.dst_rows: row is not driven")
    _check_unique(_handed_out(plan), "forks, appends: block twice")
    _check_device_ids(tails[tails > 0], "forks.tail_dst_block_ids", limits)
    _refuse((tails > 0) & (rows.num_blocks[src] == 0), src, "forks: row has no block to replace")
    for column in (rows.num_blocks, rows.num_computed_tokens, rows.num_tokens):
        column[dst] = column[src]
    rows.is_live[dst] = True
    rows.is_driven[dst] = True


def _check_new_rows(new: NewRows, rows: _Rows, limits: RunnerInfo, max_blocks_per_row: int) -> None:
    ids = new.rows
    _check_range(ids, "new_rows", rows)
    _check_unique(ids, "new_rows: row twice")
    _refuse(rows.is_live[ids], ids, "new_rows: row is live")
    computed, known = new.num_computed_tokens, new.num_tokens
    _refuse((known < 1) | (known > limits.max_model_len), ids, "new_rows.num_tokens: out of range")
    _refuse(new.num_prompt_tokens > known, ids, "new_rows.num_prompt_tokens: above num_tokens")
    is_borrowing = new.logits_from > 0
    _refuse(
        (computed == known) != is_borrowing,
        ids,
        "new_rows: num_computed_tokens == num_tokens if and only if logits_from",
    )
    _refuse(new.logits_from > limits.max_rows, ids, "new_rows.logits_from: no such row")
    _refuse(new.block_counts > max_blocks_per_row, ids, "new_rows.block_counts: too many")
    _refuse(
        computed > new.block_counts.astype(np.int64) * limits.block_size,
        ids,
        "new_rows: computed tokens exceed the blocks",
    )
    _check_device_ids(new.block_ids, "new_rows.block_ids", limits)
    table_of_id = np.repeat(np.arange(ids.size, dtype=np.int64), new.block_counts)
    _check_unique(
        table_of_id * limits.num_device_blocks + new.block_ids, "new_rows: block twice in one table"
    )
    _check_vocabulary(new.token_ids, "new_rows.token_ids", limits)
    _check_sampling(new)
    rows.is_live[ids] = True
    rows.is_driven[ids] = new.flags & pb.ROW_FLAG_DRIVEN != 0
    rows.num_blocks[ids] = new.block_counts
    rows.num_computed_tokens[ids] = computed
    rows.num_tokens[ids] = known


def _check_sampling(new: NewRows) -> None:
    ids = new.rows
    _refuse(new.flags & ~np.uint32(_KNOWN_FLAGS) != 0, ids, "new_rows.flags: unknown bits")
    _refuse(new.num_candidates > MAX_CANDIDATES, ids, "new_rows.num_candidates: above 64")
    _refuse(
        ~np.isfinite(new.temperature) | (new.temperature < 0),
        ids,
        "new_rows.temperature: negative or not finite",
    )
    for name in ("top_p", "min_p"):
        value = getattr(new, name)
        _refuse(~((value >= 0) & (value <= 1)), ids, f"new_rows.{name}: outside [0, 1]")
    penalties = (new.repetition_penalty, new.presence_penalty, new.frequency_penalty)
    for penalty in penalties:
        _refuse(~np.isfinite(penalty), ids, "new_rows: penalty is not finite")
    _refuse(new.repetition_penalty < 0, ids, "new_rows.repetition_penalty: negative")
    has_penalty = np.any([penalty != 0 for penalty in penalties], axis=0)
    without_history = new.flags & pb.ROW_FLAG_HISTORY == 0
    _refuse(has_penalty & without_history, ids, "new_rows: penalties without history")


def _check_appends(plan: Plan, rows: _Rows, limits: RunnerInfo, max_blocks_per_row: int) -> None:
    ids, counts = plan.append_rows, plan.append_counts
    _check_live(ids, "appends.rows", rows)
    _check_unique(ids, "appends.rows: row twice")
    _check_device_ids(plan.append_block_ids, "appends.block_ids", limits)
    _check_unique(_handed_out(plan), "forks, appends: block twice")
    num_blocks = rows.num_blocks[ids] + counts.astype(np.int64)
    _refuse(num_blocks > max_blocks_per_row, ids, "appends: block table is full")
    rows.num_blocks[ids] = num_blocks


def _check_inputs(plan: Plan, rows: _Rows, limits: RunnerInfo) -> None:
    ids = plan.input_rows
    _check_live(ids, "inputs.rows", rows)
    _check_unique(ids, "inputs.rows: row twice")
    _refuse(~rows.is_driven[ids], ids, "inputs.rows: row is not driven")
    _refuse(
        rows.num_computed_tokens[ids] != rows.num_tokens[ids],
        ids,
        "inputs.rows: row still has tokens to compute",
    )
    _check_vocabulary(plan.input_token_ids, "inputs.token_ids", limits)
    rows.num_tokens[ids] += 1


def _check_batch(
    plan: Plan, previous_rows: npt.NDArray[np.int32], rows: _Rows, limits: RunnerInfo
) -> None:
    # As indices are wanted; every use of another type would convert them.
    ids = (previous_rows if plan.same_batch else plan.batch_rows).astype(np.intp)
    if plan.same_batch:
        if not ids.size:
            raise PlanError("batch.same: the previous batch is empty")
        counts: _Array = np.ones(ids.size, np.int64)
        remaining = rows.num_tokens[ids] - rows.num_computed_tokens[ids]
        _refuse(remaining > 1, ids, "batch.same: row has more than one token to compute")
    else:
        counts = plan.num_scheduled_tokens.astype(np.int64)
        _check_range(ids, "batch.rows", rows)
        _check_unique(ids, "batch.rows: row twice")
        _refuse(counts == 0, ids, "batch.num_scheduled_tokens: zero")
        if plan.num_decode_rows > ids.size:
            raise PlanError("batch.num_decode_rows: more than rows")
        decode = slice(plan.num_decode_rows)
        _refuse(counts[decode] != 1, ids[decode], "batch: decode row without exactly one token")
    _refuse(~rows.is_live[ids], ids, "batch.rows: row is not live")
    if int(counts.sum()) > limits.max_num_batched_tokens:
        raise PlanError(f"batch: {int(counts.sum())} tokens exceed max_num_batched_tokens")
    ends = rows.num_computed_tokens[ids] + counts
    is_beyond = ends > rows.num_tokens[ids]
    _refuse(is_beyond & rows.is_driven[ids], ids, "batch.rows: driven row without an input")
    _refuse(is_beyond, ids, "batch: scheduled beyond the known tokens")
    _refuse(ends > limits.max_model_len, ids, "batch: scheduled beyond max_model_len")
    capacity = rows.num_blocks[ids].astype(np.int64) * limits.block_size
    _refuse(ends > capacity, ids, "batch: scheduled tokens exceed the blocks")
    if np.count_nonzero(plan.new_rows.logits_from):
        _check_borrowers(plan.new_rows, ids[ends == rows.num_tokens[ids]], rows)


def _check_borrowers(new: NewRows, sampling_rows: _Array, rows: _Rows) -> None:
    is_borrowing = new.logits_from > 0
    borrowers, sources = new.rows[is_borrowing], new.logits_from[is_borrowing] - 1
    is_sampling = np.zeros(rows.is_live.size, np.bool_)
    is_sampling[sampling_rows] = True
    _refuse(~is_sampling[sources], sources, "new_rows.logits_from: row does not sample here")
    _refuse(
        rows.num_tokens[sources] != rows.num_tokens[borrowers],
        borrowers,
        "new_rows.logits_from: lengths differ",
    )


def _handed_out(plan: Plan) -> U32Array:
    """Block ids that the plan puts into tables of existing rows."""
    tails = plan.fork_tail_dst_block_ids
    return np.concatenate([plan.append_block_ids, tails[tails > 0]])


def _refuse(is_bad: _Array, ids: _Array, reason: str) -> None:
    # A tenth of the time of `any`, and a step asks a dozen times.
    if np.count_nonzero(is_bad):
        raise PlanError(f"{reason}: {ids[is_bad][:4].tolist()}")


def _check_range(ids: _Array, name: str, rows: _Rows) -> None:
    _refuse(ids >= rows.is_live.size, ids, f"{name}: no such row")


def _check_live(ids: U32Array, name: str, rows: _Rows) -> None:
    _check_range(ids, name, rows)
    _refuse(~rows.is_live[ids], ids, f"{name}: row is not live")


def _check_unique(ids: _Array, reason: str) -> None:
    ordered = np.sort(ids)
    _refuse(ordered[1:] == ordered[:-1], ordered[1:], reason)


def _check_disjoint(left: U32Array, right: U32Array, reason: str) -> None:
    if left.size and right.size:
        _refuse(np.isin(left, right), left, reason)


def _check_device_ids(ids: U32Array, name: str, limits: RunnerInfo) -> None:
    _refuse((ids == 0) | (ids >= limits.num_device_blocks), ids, f"{name}: not a usable block")


def _check_vocabulary(token_ids: U32Array, name: str, limits: RunnerInfo) -> None:
    _refuse(token_ids >= limits.vocab_size, token_ids, f"{name}: not in the vocabulary")

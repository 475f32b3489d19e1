"""Bugs that schedulers and executors of this kind have had, injected by patching the real code.

Each takes pytest's MonkeyPatch. The proof that the random walk can fail: it must catch every one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import pytest

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import NewRows, Plan
from executor_svc.row_state import RowState
from executor_svc.runner import StepBatch
from executor_svc.step_ledger import StepLedger
from scheduler_svc import plan_codec
from scheduler_svc import scheduler as scheduler_module
from scheduler_svc.batch import BatchBuilder
from scheduler_svc.block_pool import BlockIds
from scheduler_svc.kv_manager import KVManager, RowIds
from scheduler_svc.request import Request, TokenIds
from scheduler_svc.rows import Rows
from scheduler_svc.scheduler import Limits, Scheduler
from scheduler_svc.step_plan import NewRow, StepOutput, StepPlan, TokenColumns

Patch = pytest.MonkeyPatch


# ---- the pool's books


def block_released_while_in_use(patch: Patch) -> None:
    """A row that grows gives its first block back, but goes on reading it."""
    grow_by_one = KVManager.grow_by_one

    def buggy(self: KVManager, rows: RowIds) -> BlockIds:
        block_ids = grow_by_one(self, rows)
        self.pool.release(self.table(int(rows[0]))[:1])
        return block_ids

    patch.setattr(KVManager, "grow_by_one", buggy)


def block_released_twice(patch: Patch) -> None:
    """The first block of a row that ends is on the free stack twice."""
    release = KVManager.release

    def buggy(self: KVManager, row: int) -> None:
        first = self.table(row)[:1].copy()
        release(self, row)
        self.pool._free[:1] = first

    patch.setattr(KVManager, "release", buggy)


def block_appended_late(patch: Patch) -> None:
    """A full row gets its next block one step too late."""

    def buggy(
        self: KVManager, rows: RowIds, num_tokens: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        return num_tokens > self.num_blocks[rows] * self.block_size

    patch.setattr(KVManager, "full", buggy)


# ---- what a plan says


def _change_plans(patch: Patch, change: Callable[[StepPlan], StepPlan]) -> None:
    encode = plan_codec.encode
    patch.setattr(plan_codec, "encode", lambda plan: encode(change(plan)))


def _skip_tokens(plan: StepPlan, new: NewRow, num_tokens: int) -> tuple[NewRow, int]:
    """The row with its first tokens taken for computed, and the chunk that is left of it."""
    chunk = plan.num_scheduled_tokens[plan.rows.tolist().index(new.row) - plan.num_decode_rows]
    num_skipped = min(num_tokens, chunk - 1)
    row = dataclasses.replace(
        new, num_computed_tokens=num_skipped, token_ids=new.token_ids[num_skipped:]
    )
    return row, chunk - num_skipped


def _skip_in_new_rows(plan: StepPlan, num_tokens: Callable[[Request], int]) -> StepPlan:
    chunks = list(plan.num_scheduled_tokens)
    new_rows = []
    for new in plan.new_rows:
        row, chunk = _skip_tokens(plan, new, num_tokens(new.request))
        new_rows.append(row)
        chunks[plan.rows.tolist().index(new.row) - plan.num_decode_rows] = chunk
    return dataclasses.replace(plan, new_rows=new_rows, num_scheduled_tokens=chunks)


def uncomputed_token_published(patch: Patch) -> None:
    """A new row's first slot counts as computed though nobody wrote it."""
    _change_plans(patch, lambda plan: _skip_in_new_rows(plan, lambda _: 1))


def preempted_row_taken_for_computed(patch: Patch) -> None:
    """A request that comes back is believed to find its KV as it left it."""
    _change_plans(
        patch,
        lambda plan: _skip_in_new_rows(plan, lambda r: 10**6 if r.num_preemptions else 0),
    )


def append_missing_in_plan(patch: Patch) -> None:
    """The last append of a plan is not sent."""

    def change(plan: StepPlan) -> StepPlan:
        return dataclasses.replace(
            plan,
            append_rows=plan.append_rows[:-1],
            append_counts=plan.append_counts[:-1],
            append_block_ids=[np.concatenate(plan.append_block_ids)[: sum(plan.append_counts[:-1])]]
            if plan.append_rows
            else [],
        )

    _change_plans(patch, change)


def appends_exchanged(patch: Patch) -> None:
    """Blocks appended by one plan reach each other's rows."""

    def change(plan: StepPlan) -> StepPlan:
        is_even = len(set(plan.append_counts)) == 1
        block_ids = [ids[::-1] for ids in plan.append_block_ids[::-1]]
        return dataclasses.replace(plan, append_block_ids=block_ids) if is_even else plan

    _change_plans(patch, change)


def freed_row_not_told(patch: Patch) -> None:
    """One freed row of a plan is not sent."""
    _change_plans(patch, lambda p: dataclasses.replace(p, freed_rows=p.freed_rows[1:]))


def seed_lost_at_readmission(patch: Patch) -> None:
    """A preempted request samples with another seed afterwards."""

    def change(plan: StepPlan) -> StepPlan:
        new_rows = []
        for new in plan.new_rows:
            request = dataclasses.replace(new.request)
            if request.num_preemptions:
                request.sampling = dataclasses.replace(request.sampling, seed=0)
            new_rows.append(dataclasses.replace(new, request=request))
        return dataclasses.replace(plan, new_rows=new_rows)

    _change_plans(patch, change)


def other_batch_taken_for_the_same(patch: Patch) -> None:
    """As many decode rows as before count as the same decode rows."""
    build = BatchBuilder.build

    def buggy(
        self: BatchBuilder, rows: Rows, freed_rows: list[int], last_batch: RowIds
    ) -> StepPlan:
        plan = build(self, rows, freed_rows, last_batch)
        plan.same_batch = 0 < plan.num_decode_rows == len(plan.rows) == len(last_batch)
        return plan

    patch.setattr(BatchBuilder, "build", buggy)


# ---- tokens under way


def token_under_way_not_published(patch: Patch) -> None:
    """A preempted request keeps the token of its last step, but its client never sees it."""
    commit_detached = Scheduler._commit_detached

    def buggy(self: Scheduler, plan: StepPlan, token_ids: TokenIds, tokens: TokenColumns) -> None:
        commit_detached(self, plan, token_ids, TokenColumns())

    patch.setattr(Scheduler, "_commit_detached", buggy)


def token_under_way_not_kept(patch: Patch) -> None:
    """A preempted request's client sees the token of its last step, but the request forgets it."""
    commit_detached = Scheduler._commit_detached

    def buggy(self: Scheduler, plan: StepPlan, token_ids: TokenIds, tokens: TokenColumns) -> None:
        before = {request: request.token_ids for request in self._detached.values()}
        commit_detached(self, plan, token_ids, tokens)
        for request, known in before.items():
            if not request.status.is_finished:
                request.token_ids = known

    patch.setattr(Scheduler, "_commit_detached", buggy)


def token_given_to_next_resident(patch: Patch) -> None:
    """A row's residents are not told apart."""
    leave = Rows.leave

    def buggy(self: Rows, request: Request) -> int:
        row = leave(self, request)
        self.generations[row] -= 1
        return row

    patch.setattr(Rows, "leave", buggy)


def readmitted_before_token_came(patch: Patch) -> None:
    """A preempted request re-enters while a token of it is under way."""
    may_enter = Scheduler._may_enter

    def buggy(self: Scheduler, request: Request) -> bool:
        request.last_step_id = 0
        return may_enter(self, request)

    patch.setattr(Scheduler, "_may_enter", buggy)


def failed_row_published(patch: Patch) -> None:
    """Tokens of logits that are not finite reach the client."""
    patch.setattr(Scheduler, "_fail_rows", lambda *_: None)


# ---- policy and epochs


def oldest_preempted(patch: Patch) -> None:
    """The victim is the oldest."""

    def buggy(running: Iterable[Request], for_request: Request) -> Request | None:
        return min(running, key=lambda request: request.key, default=None)

    patch.setattr(scheduler_module, "pick_victim", buggy)


def epoch_not_reset(patch: Patch) -> None:
    """The scheduler goes on with its old tables on an executor that holds nothing."""
    begin_epoch = Scheduler.begin_epoch

    def buggy(self: Scheduler, epoch: int, limits: Limits) -> StepOutput:
        if self.epoch == 0:
            return begin_epoch(self, epoch, limits)
        self.epoch = epoch
        self.in_flight.clear()
        self._next_step_id = 1
        return TokenColumns().build()

    patch.setattr(Scheduler, "begin_epoch", buggy)


# ---- the executor


def table_entry_left_stale(patch: Patch) -> None:
    """The last block of a new row's table stays what an earlier row had there."""
    begin = RowState._begin

    def buggy(self: RowState, new: NewRows) -> None:
        last = new.block_counts.astype(np.int64) - 1
        stale = self.block_table[new.rows, last]
        begin(self, new)
        self.block_table[new.rows, last] = stale

    patch.setattr(RowState, "_begin", buggy)


def append_missed_by_executor(patch: Patch) -> None:
    """A row's length grows, its table does not."""
    append = RowState._append

    def buggy(self: RowState, plan: Plan) -> None:
        table = self.block_table.copy()
        append(self, plan)
        self.block_table[:] = table

    patch.setattr(RowState, "_append", buggy)


def decode_position_off_by_one(patch: Patch) -> None:
    """Decode rows write and read one position too low."""
    apply = RowState.apply

    def buggy(self: RowState, plan: Plan) -> StepBatch:
        batch = apply(self, plan)
        positions = batch.num_computed_tokens.copy()
        positions[: batch.num_decode_rows] -= 1
        return dataclasses.replace(batch, num_computed_tokens=positions)

    patch.setattr(RowState, "apply", buggy)


def resent_plan_applied_again(patch: Patch) -> None:
    """The executor does not look at step ids."""

    def buggy(self: StepLedger, epoch: int, step_id: int) -> bool:
        self.applied_step_id = max(step_id, self.applied_step_id)
        return True

    patch.setattr(StepLedger, "accept", buggy)


def result_kept_out_of_date(patch: Patch) -> None:
    """A resent plan is answered with the newest result, under its own step id."""

    def buggy(self: StepLedger, step_id: int) -> list[pb.StepResult]:
        results = []
        for kept in self._kept:
            if kept.step_id > step_id:
                result = pb.StepResult()
                result.CopyFrom(self._kept[-1])
                result.step_id = kept.step_id
                results.append(result)
        return results

    patch.setattr(StepLedger, "kept_after", buggy)

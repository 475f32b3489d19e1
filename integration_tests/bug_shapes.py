"""Bugs that schedulers and executors of this kind have had, injected by patching the real code.

Each takes pytest's MonkeyPatch. The proof that the random walk can fail: it must catch every one.
Those of prefixes, forks and swapping are in bug_shapes_memory.
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
from scheduler_svc import plan_codec, planner
from scheduler_svc.batch import BatchBuilder
from scheduler_svc.block_pool import BlockIds
from scheduler_svc.committer import Committer
from scheduler_svc.kv_manager import KVManager
from scheduler_svc.limits import Limits
from scheduler_svc.planner import Planner
from scheduler_svc.request import Branch
from scheduler_svc.rows import Rows
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Moves, NewRow, RowIds, StepOutput, StepPlan, TokenColumns

Patch = pytest.MonkeyPatch


# ---- the pool's books


def block_released_while_in_use(patch: Patch) -> None:
    """A row that grows gives its first block back, but goes on reading it."""
    grow_by_one = KVManager.grow_by_one

    def buggy(self: KVManager, rows: RowIds) -> BlockIds:
        block_ids = grow_by_one(self, rows)
        first = self.table(int(rows[0]))[:1]
        self.pool.forget(first)
        self.pool.release(first)
        return block_ids

    patch.setattr(KVManager, "grow_by_one", buggy)


def block_released_twice(patch: Patch) -> None:
    """The first block of a row that ends is blank, and free a second time."""
    release = KVManager.release

    def buggy(self: KVManager, row: int) -> int:
        first = self.table(row)[:1].copy()
        held_block_ns = release(self, row)
        if len(first) and self.pool._num_blank:
            self.pool._blank[:1] = first
        return held_block_ns

    patch.setattr(KVManager, "release", buggy)


def block_appended_late(patch: Patch) -> None:
    """A full row gets its next block one step too late."""

    def buggy(
        self: KVManager, rows: RowIds, num_tokens: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        return num_tokens > self.num_blocks[rows] * self.block_size

    patch.setattr(KVManager, "full", buggy)


# ---- what a plan says


def change_plans(patch: Patch, change: Callable[[StepPlan], StepPlan]) -> None:
    """Send other plans than the scheduler made."""
    encode = plan_codec.encode
    patch.setattr(plan_codec, "encode", lambda plan: encode(change(plan)))


def _skip_in_new_rows(plan: StepPlan, num_tokens: Callable[[Branch], int]) -> StepPlan:
    """Take the first tokens of rows that prefill for computed, as far as something is left."""
    chunks = list(plan.num_scheduled_tokens)
    new_rows = []
    for new in plan.new_rows:
        num_skipped = 0
        if new.logits_from is None:
            index = plan.rows.tolist().index(new.row) - plan.num_decode_rows
            num_skipped = min(num_tokens(new.branch), chunks[index] - 1)
            chunks[index] -= num_skipped
        new_rows.append(_skip_tokens(new, num_skipped))
    return dataclasses.replace(plan, new_rows=new_rows, num_scheduled_tokens=chunks)


def _skip_tokens(new: NewRow, num_tokens: int) -> NewRow:
    return dataclasses.replace(
        new,
        num_computed_tokens=new.num_computed_tokens + num_tokens,
        token_ids=new.token_ids[num_tokens:],
    )


def uncomputed_token_published(patch: Patch) -> None:
    """A new row's first slot counts as computed though nobody wrote it."""
    change_plans(patch, lambda plan: _skip_in_new_rows(plan, lambda _: 1))


def preempted_row_taken_for_computed(patch: Patch) -> None:
    """A request that comes back is believed to find its KV as it left it."""
    change_plans(
        patch,
        lambda plan: _skip_in_new_rows(plan, lambda branch: 10**6 * (branch.num_preemptions > 0)),
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

    change_plans(patch, change)


def appends_exchanged(patch: Patch) -> None:
    """Blocks appended by one plan reach each other's rows."""

    def change(plan: StepPlan) -> StepPlan:
        is_even = len(set(plan.append_counts)) == 1
        block_ids = [ids[::-1] for ids in plan.append_block_ids[::-1]]
        return dataclasses.replace(plan, append_block_ids=block_ids) if is_even else plan

    change_plans(patch, change)


def freed_row_not_told(patch: Patch) -> None:
    """One freed row of a plan is not sent."""
    change_plans(patch, lambda p: dataclasses.replace(p, freed_rows=p.freed_rows[1:]))


def seed_lost_at_readmission(patch: Patch) -> None:
    """A preempted request samples with another seed afterwards."""

    def change(plan: StepPlan) -> StepPlan:
        new_rows = []
        for new in plan.new_rows:
            branch = new.branch
            if branch.num_preemptions:
                sampling = dataclasses.replace(branch.request.sampling, seed=0)
                request = dataclasses.replace(branch.request, sampling=sampling)
                branch = dataclasses.replace(branch, request=request)
            new_rows.append(dataclasses.replace(new, branch=branch))
        return dataclasses.replace(plan, new_rows=new_rows)

    change_plans(patch, change)


def other_batch_taken_for_the_same(patch: Patch) -> None:
    """As many decode rows as before count as the same decode rows."""
    build = BatchBuilder.build

    def buggy(
        self: BatchBuilder, rows: Rows, freed_rows: list[int], moves: Moves, last_batch: RowIds
    ) -> StepPlan:
        plan = build(self, rows, freed_rows, moves, last_batch)
        plan.same_batch = 0 < plan.num_decode_rows == len(plan.rows) == len(last_batch)
        return plan

    patch.setattr(BatchBuilder, "build", buggy)


# ---- tokens under way


def token_under_way_not_published(patch: Patch) -> None:
    """A preempted request keeps the token of its last step, but its client never sees it."""
    commit_detached = Committer._commit_detached

    def buggy(self: Committer) -> None:
        tokens, self._tokens = self._tokens, TokenColumns()
        commit_detached(self)
        self._tokens = tokens

    patch.setattr(Committer, "_commit_detached", buggy)


def token_under_way_not_kept(patch: Patch) -> None:
    """A preempted request's client sees the token of its last step, but the request forgets it."""
    commit_detached = Committer._commit_detached

    def buggy(self: Committer) -> None:
        before = {branch: branch.token_ids for branch in self._residents.detached.values()}
        commit_detached(self)
        for branch, known in before.items():
            if not branch.status.is_finished:
                branch.token_ids = known

    patch.setattr(Committer, "_commit_detached", buggy)


def token_given_to_next_resident(patch: Patch) -> None:
    """A row's residents are not told apart."""
    leave = Rows.leave

    def buggy(self: Rows, branch: Branch) -> int:
        row = leave(self, branch)
        self.generations[row] -= 1
        return row

    patch.setattr(Rows, "leave", buggy)


def readmitted_before_token_came(patch: Patch) -> None:
    """A preempted request re-enters while a token of it is under way."""
    may_enter = Planner._may_enter

    def buggy(self: Planner, branch: Branch) -> bool:
        branch.last_step_id = 0
        return may_enter(self, branch)

    patch.setattr(Planner, "_may_enter", buggy)


def failed_row_published(patch: Patch) -> None:
    """Tokens of logits that are not finite reach the client."""
    patch.setattr(Committer, "_fail_rows", lambda _: None)


# ---- policy and epochs


def oldest_preempted(patch: Patch) -> None:
    """The victim is the oldest."""

    def buggy(running: Iterable[Branch], for_branch: Branch) -> Branch | None:
        others = (branch for branch in running if branch is not for_branch)
        return min(others, key=lambda branch: branch.key, default=None)

    patch.setattr(planner, "pick_victim", buggy)


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

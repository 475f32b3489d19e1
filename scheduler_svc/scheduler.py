"""The scheduler: continuous batching and chunked prefill under one token budget.

Synchronous, no I/O, no clock of its own. `plan` decides one step and its plan is always sent;
`commit` takes the results in the same order. What is in flight lives in one deque of plans.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from scheduler_svc.accounting import Accounting, device_pool, host_pool
from scheduler_svc.batch import BatchBuilder
from scheduler_svc.committer import Committer, commit_beams
from scheduler_svc.cost_model import CostModel
from scheduler_svc.kv_manager import KVManager
from scheduler_svc.lifecycle import Lifecycle
from scheduler_svc.limits import Limits
from scheduler_svc.planner import Planner
from scheduler_svc.policy import Policy
from scheduler_svc.request import Branch, Request, RequestStatus
from scheduler_svc.residents import Residents
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import (
    Finished,
    RowIds,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenColumns,
)
from scheduler_svc.waiting_queue import WaitingQueue

MAX_SUSPICIONS = 4
"""A branch in flight at this many epoch ends in a row, with no token in between, fails."""


class StuckError(AssertionError):
    """There are branches and nothing is under way, and yet no step could be planned: a bug."""


class Scheduler:
    """Owns requests, rows and blocks of one executor."""

    def __init__(self, limits: Limits, policy: Policy | None = None) -> None:
        """Start with no executor epoch; `begin_epoch` must come before the first plan."""
        self.epoch = 0
        self._life = Lifecycle(limits, policy or Policy())
        self._last_batch: RowIds = np.empty(0, np.int64)
        self._next_step_id = 1

    # ---- what it holds

    @property
    def limits(self) -> Limits:
        """Of the executor of this epoch."""
        return self._life.limits

    @property
    def rows(self) -> Rows:
        """Columns over the executor's rows."""
        return self._life.residents.rows

    @property
    def kv(self) -> KVManager:
        """Block tables and pools."""
        return self._life.residents.kv

    @property
    def running(self) -> dict[int, Branch]:
        """Branches in rows, by key, in order of admission."""
        return self._life.residents.running

    @property
    def waiting(self) -> WaitingQueue:
        """Branches in line; of a beam search its leader alone."""
        return self._life.waiting

    @property
    def in_flight(self) -> deque[StepPlan]:
        """Plans sent and not committed."""
        return self._life.residents.in_flight

    @property
    def last_step_id(self) -> int:
        """The newest plan's id in this epoch; 0 if there was none."""
        return self._next_step_id - 1

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting or running, or a freed row is still to be told."""
        return bool(self.running or len(self.waiting) or self._life.residents.freed_rows)

    @property
    def has_beams_in_flight(self) -> bool:
        """Whether a beam search runs whose next step waits for a result that is under way."""
        return any(
            not group.is_ready and group.leader.status is RequestStatus.RUNNING
            for group in self._life.groups.values()
        )

    @property
    def num_deferred(self) -> int:
        """Branches in line that more rows and blocks alone would not let in.

        Their tokens under way are not committed yet, or they are kept apart as suspects.
        """
        held_back = {
            *self._life.residents.detached.values(),
            *(branch for branch in self._life.suspects if branch.must_run_alone),
        }
        return sum(branch.is_queued for branch in held_back)

    def snapshot(self) -> Accounting:
        """The pools by class, and everything counted so far. O(running branches)."""
        residents, counters = self._life.residents, dataclasses.replace(self._life.counters)
        counters.num_evicted += residents.kv.pool.num_evicted
        counters.num_copied += residents.kv.num_copied
        counters.num_swapped_out += residents.kv.num_swapped_out
        counters.num_swapped_in += residents.kv.num_swapped_in
        return Accounting(device_pool(residents), host_pool(residents), counters)

    def set_cost_model(self, cost_model: CostModel) -> None:
        """What steps cost from now on, for the choice between recomputing and swapping.

        An executor that was just started knows nothing yet: what was known before still holds.
        """
        if cost_model.has_step_prices:
            self._life.set_cost_model(cost_model)

    def flush_cache(self) -> tuple[int, int]:
        """Forget all blocks that nobody holds; returns how many on the device and on the host."""
        return self.kv.pool.forget_cached(), self.kv.host.forget_cached()

    # ---- requests

    def submit(self, request: Request) -> None:
        """Queue a request that the limits can hold."""
        self._life.submit(request)

    def abort(self, request: Request) -> None:
        """End a request now; tokens still under way for it are dropped."""
        self._life.abort(request)

    def drop(self, request: Request) -> None:
        """End a waiting request that could hardly meet its deadline, for want of room."""
        self._life.drop(request)

    def take_expired(self) -> list[Request]:
        """Requests dropped since the last call: their deadline could no longer be met."""
        expired, self._life.expired = self._life.expired, []
        return expired

    def estimated_wait_ns(self) -> float:
        """How long a request queued now would wait, as far as one can tell; 0: one cannot."""
        return self._life.pace.wait_ns(len(self.waiting), len(self.running))

    def swap_time_ns(self, num_blocks: int) -> float:
        """How long moving so many blocks between the pools should take; 0: one cannot tell."""
        bytes_per_s = self._life.cost_model.swap_bytes_per_s
        return num_blocks * self.limits.block_bytes / bytes_per_s * 1e9 if bytes_per_s else 0.0

    def stop(self, branch: Branch, num_output_tokens: int) -> Finished:
        """End one sample, in whose text a stop string was found, with so many output tokens."""
        return self._life.end_branch(branch, RequestStatus.FINISHED_STOP, num_output_tokens)

    # ---- steps

    def plan(self, now_ns: int) -> StepPlan | None:
        """Decide the next step; None if there is nothing to do or to say.

        The plan counts as sent: the caller must deliver it. Raises StuckError if branches wait
        that nothing holds back: a bug.
        """
        residents = self._life.residents
        self._life.now_ns = now_ns
        residents.kv.begin_plan(now_ns)
        batch = BatchBuilder(self.epoch, self._next_step_id, self.limits.max_num_batched_tokens)
        Planner(self._life, batch, now_ns).fill()
        moves = residents.kv.end_plan()
        plan = batch.build(residents.rows, residents.freed_rows, moves, self._last_batch)
        if plan.is_empty:
            if (self.running or len(self.waiting)) and not self.in_flight:
                raise StuckError(
                    f"{len(self.running)} branches run and {len(self.waiting)} wait, for nothing"
                )
            return None
        residents.freed_rows = []
        self._next_step_id += 1
        self._last_batch = plan.rows
        residents.in_flight.append(plan)
        self._life.counters.num_steps += 1
        return plan

    def commit(self, result: StepTokens) -> StepOutput:
        """Take the result of the oldest plan in flight; returns the tokens and who ended."""
        plan = self.in_flight.popleft()
        return Committer(self._life, plan, result).commit()

    # ---- epochs

    def begin_epoch(self, epoch: int, limits: Limits) -> StepOutput:
        """Start over on an executor that holds nothing; every branch keeps its tokens.

        Running branches return to the queue, suspects first (see waiting_queue); longest outputs
        shrink to the new limits. Returns those that fail: in flight at MAX_SUSPICIONS epoch ends
        in a row, or already too long; and beam searches that the new length limit ends.
        """
        life, old = self._life, self._life.residents
        is_other_size = limits.block_size != life.limits.block_size
        stopped = self._stop_running(old)
        self._add_counters(old)
        life.begin_epoch(limits)
        for branch in stopped:
            if branch.index == 0 or branch.request.beam is None:
                life.queue(branch)
        for branch in life.waiting:
            branch.last_step_id = 0  # step ids start again
            for each in branch.request.branches:
                each.host_block_ids = []
        if is_other_size:
            life.rename_waiting()
        life.counters.num_recoveries += self.epoch > 0
        self.epoch = epoch
        self._last_batch = np.empty(0, np.int64)
        self._next_step_id = 1
        return self._fail_hopeless()

    def _stop_running(self, old: Residents) -> list[Branch]:
        """Take everybody out of their rows; returns who ran."""
        in_flight_rows = {int(row) for plan in old.in_flight for row in plan.rows}
        for group in self._life.groups.values():
            if group.leader.status is RequestStatus.RUNNING:
                group.settle()
        stopped = []
        for branch in [*old.running.values(), *old.detached.values()]:
            if branch.status.is_finished:
                continue
            branch.num_recoveries += 1
            if branch.status is RequestStatus.WAITING or branch.row in in_flight_rows:
                branch.num_suspicions += 1
                self._life.suspects.add(branch)
            if branch.status is RequestStatus.RUNNING:
                old.settle(branch)
                branch.request.blocks.held_block_ns += old.kv.release(branch.row)
                old.rows.leave(branch)
                branch.move_to(RequestStatus.WAITING)
                stopped.append(branch)
        return stopped

    def _add_counters(self, old: Residents) -> None:
        """Keep what the pools of the epoch that ends have counted."""
        counters = self._life.counters
        counters.num_evicted += old.kv.pool.num_evicted
        counters.num_copied += old.kv.num_copied
        counters.num_swapped_out += old.kv.num_swapped_out
        counters.num_swapped_in += old.kv.num_swapped_in

    def _fail_hopeless(self) -> StepOutput:
        life, tokens = self._life, TokenColumns()
        for branch in list(life.waiting):
            if branch.status.is_finished:
                continue  # with another branch of its request
            request = branch.request
            longest = self.limits.max_total_tokens
            if request.beam is not None:
                longest = self.limits.max_beam_tokens(request.num_prompt_tokens, request.width)
            suspects = request.branches if request.beam is not None else [branch]
            if any(each.num_suspicions >= MAX_SUSPICIONS for each in suspects):
                life.fail(branch, "in flight each time the executor was lost", tokens)
            elif request.num_prompt_tokens >= longest or request.width > self.limits.max_num_seqs:
                life.fail(branch, "too large for the executor that replaced a lost one", tokens)
            else:
                self._shorten(branch, longest, tokens)
        life.suspects = {branch for branch in life.suspects if not branch.status.is_finished}
        return tokens.build()

    def _shorten(self, branch: Branch, longest: int, tokens: TokenColumns) -> None:
        """Lower the length limit of a waiting branch's request; who has reached it ends."""
        life, request = self._life, branch.request
        request.max_total_tokens = min(request.max_total_tokens, longest)
        if (group := life.groups.get(request.key)) is not None:
            group.search.shorten(request.max_total_tokens)
            if group.search.is_done:
                commit_beams(life, group, tokens)
        elif len(branch.token_ids) >= request.max_total_tokens:
            num_output_tokens = len(branch.token_ids) - request.num_prompt_tokens
            tokens.finished.append(
                life.end_branch(branch, RequestStatus.FINISHED_LENGTH, num_output_tokens)
            )

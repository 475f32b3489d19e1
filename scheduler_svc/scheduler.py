"""The scheduler: continuous batching and chunked prefill under one token budget.

Synchronous, no I/O, no clock of its own. `plan` decides one step and its plan is always sent;
`commit` takes the results in the same order. What is in flight lives in one deque of plans.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from scheduler_svc.batch import BatchBuilder
from scheduler_svc.kv_manager import KVManager, RowIds
from scheduler_svc.policy import WaitingQueue, needs_reservation, pick_victim
from scheduler_svc.request import NO_ROW, Request, RequestStatus, TokenIds
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import Finished, NewRow, StepOutput, StepPlan, StepTokens, TokenColumns

MAX_SUSPICIONS = 3
"""A request in flight at this many epoch ends in a row, with no token in between, fails."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the executor holds and what the operator allows."""

    num_device_blocks: int  # the padding block included
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    watermark_blocks: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) must be 1 to max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running request decodes one token a step"
            )

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request: the last token needs no KV slot."""
        return min(self.max_model_len, (self.num_device_blocks - 1) * self.block_size + 1)


class Scheduler:
    """Owns requests, rows and blocks of one executor."""

    def __init__(self, limits: Limits) -> None:
        """Start with no executor epoch; `begin_epoch` must come before the first plan."""
        self._set_limits(limits)
        self.epoch = 0
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self._is_stop_token = np.zeros(limits.vocab_size, np.bool_)  # of any request so far
        self._suspects: set[Request] = set()  # with num_suspicions > 0

    def _set_limits(self, limits: Limits) -> None:
        self.limits = limits
        self.rows = Rows(limits.max_num_seqs, limits.max_total_tokens)
        self.kv = KVManager(
            limits.num_device_blocks,
            limits.block_size,
            limits.max_num_seqs,
            limits.max_total_tokens,
        )
        self.running: dict[int, Request] = {}  # key -> request, in order of admission
        self._decoding: RowIds = np.empty(0, np.int64)  # rows, in the order they began to decode
        self._prefilling: list[Request] = []  # in order of admission
        self._freed_rows: list[int] = []
        self.in_flight: deque[StepPlan] = deque()
        # Preempted requests with tokens under way: (row, generation) -> request.
        self._detached: dict[tuple[int, int], Request] = {}
        self._last_batch: RowIds = np.empty(0, np.int64)
        self._next_step_id = 1

    @property
    def last_step_id(self) -> int:
        """The newest plan's id in this epoch; 0 if there was none."""
        return self._next_step_id - 1

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running, or a freed row is still to be told."""
        return bool(self.running or len(self.waiting) or self._freed_rows)

    # ---- requests

    def submit(self, request: Request) -> None:
        """Queue a request that `Limits.max_total_tokens` can hold."""
        assert request.num_prompt_tokens < request.max_total_tokens <= self.limits.max_total_tokens
        self._is_stop_token[list(request.stop_token_ids)] = True
        self.waiting.push(request)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request now; tokens still under way for it are dropped."""
        if request.status is RequestStatus.RUNNING:
            self._release(request)
            request.move_to(status)
        else:
            request.move_to(status)
            self.waiting.discard(request)

    def _release(self, request: Request) -> None:
        """Take row and blocks from a running request. The only place that does."""
        row = request.row
        self.rows.leave(request)
        self.kv.release(row)
        del self.running[request.key]
        if request in self._prefilling:
            self._prefilling.remove(request)
        else:
            self._decoding = self._decoding[self._decoding != row]
        self._freed_rows.append(row)

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the queue; its KV will be computed again."""
        row, generation = request.row, int(self.rows.generations[request.row])
        self._release(request)
        if step_ids := [p.step_id for p in self.in_flight if p.samples(row, generation)]:
            self._detached[row, generation] = request
            request.last_step_id = step_ids[-1]
        request.move_to(RequestStatus.WAITING)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    @property
    def _committed_step_id(self) -> int:
        return self.in_flight[0].step_id - 1 if self.in_flight else self._next_step_id - 1

    # ---- planning

    def plan(self, now_ns: int) -> StepPlan | None:
        """Decide the next step; None if there is nothing to do or to say.

        The plan counts as sent: the caller must deliver it. Decode rows come first, one token
        each; what is left of the token budget goes to prefills, oldest first, then to admissions.
        """
        batch = BatchBuilder(self.epoch, self._next_step_id, self.limits.max_num_batched_tokens)
        num_preemptions = self.num_preemptions
        self._plan_decodes(batch)
        for request in list(self._prefilling):
            if batch.budget and request.status is RequestStatus.RUNNING:
                self._plan_prefill(batch, request)
        if self.num_preemptions == num_preemptions:
            self._admit(batch, now_ns)
        plan = batch.build(self.rows, self._freed_rows, self._last_batch)
        if plan.is_empty:
            return None
        self._freed_rows = []
        self._next_step_id += 1
        self._last_batch = plan.rows
        self.in_flight.append(plan)
        return plan

    def _plan_decodes(self, batch: BatchBuilder) -> None:
        rows = self._schedulable_decodes()
        grown = rows[self.kv.full(rows, self.rows.num_planned[rows])]
        if len(grown) > self.kv.pool.num_free:
            rows = self._grow_under_pressure(batch, rows, grown)
        elif len(grown):
            batch.append_one_each(grown, self.kv.grow_by_one(grown))
        self.rows.num_planned[rows] += 1
        batch.set_decodes(rows)

    def _schedulable_decodes(self) -> RowIds:
        """Decode rows whose foreseen length is not reached yet [n]."""
        rows = self._decoding
        ready = self.rows.num_planned[rows] < self.rows.max_total_tokens[rows] - 1
        return rows if ready.all() else rows[ready]

    def _grow_under_pressure(self, batch: BatchBuilder, rows: RowIds, grown: RowIds) -> RowIds:
        """Grow full rows oldest first, preempting younger requests; returns the rows that run.

        A row that finds no victim sits this step out: whoever is older goes on and will finish.
        """
        stalled = set()
        for request in sorted((self._resident(row) for row in grown), key=lambda r: r.key):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an older one just now
            if self._make_room(batch, request, 1):
                batch.append_blocks(request.row, self.kv.grow_by_one(np.array([request.row])))
            else:
                stalled.add(request.row)
        runs = [r for r in rows if self.rows.requests[r] is not None and r not in stalled]
        return np.array(runs, np.int64)

    def _resident(self, row: int) -> Request:
        request = self.rows.requests[row]
        assert request is not None, row
        return request

    def _make_room(self, batch: BatchBuilder, request: Request, num_blocks: int) -> bool:
        """Preempt until `num_blocks` are free; False if nobody is left to preempt."""
        if self.kv.pool.num_free >= num_blocks:
            return True
        scheduled = batch.scheduled_rows()
        while self.kv.pool.num_free < num_blocks:
            candidates = (r for r in self.running.values() if r.row not in scheduled)
            victim = pick_victim(candidates, request)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _plan_prefill(self, batch: BatchBuilder, request: Request) -> None:
        """Schedule the next chunk of a row, as long as budget and free blocks allow."""
        row = request.row
        start, end = int(self.rows.num_planned[row]), int(self.rows.num_tokens[row])
        chunk = min(batch.budget, end - start)
        if not self._make_room(batch, request, self.kv.missing(row, start + chunk)):
            room = (int(self.kv.num_blocks[row]) + self.kv.pool.num_free) * self.kv.block_size
            chunk = min(chunk, room - start)
        if chunk <= 0:
            return
        new_block_ids = self.kv.grow(row, start + chunk)
        if start == 0:
            token_ids = self.rows.tokens[row, :end].copy()
            batch.add_row(NewRow(row, request, 0, token_ids, new_block_ids))
        elif len(new_block_ids):
            batch.append_blocks(row, new_block_ids)
        batch.add_prefill(row, chunk, samples=start + chunk == end)
        self.rows.num_planned[row] = start + chunk
        if start + chunk == end:
            self._prefilling.remove(request)
            self._decoding = np.append(self._decoding, row)

    def _admit(self, batch: BatchBuilder, now_ns: int) -> None:
        """Let waiting requests in, in order, as far as rows, budget and blocks allow."""
        while batch.budget and self.rows.num_free and (request := self.waiting.peek()) is not None:
            if not self._may_enter(request):
                return
            self.waiting.pop()
            request.move_to(RequestStatus.RUNNING)
            request.first_admitted_ns = request.first_admitted_ns or now_ns
            row = self.rows.enter(request)
            self.kv.admit(row, self._tokens_to_hold(request))
            self.running[request.key] = request
            self._prefilling.append(request)
            self._plan_prefill(batch, request)
            assert self.rows.num_planned[row] > 0, "admitted, but not scheduled"

    def _may_enter(self, request: Request) -> bool:
        if request.last_step_id > self._committed_step_id:
            return False  # its tokens under way must be known first
        if not self.running:
            return True  # it fits alone, or it would not have been queued
        if self._suspects and not self._may_join(request):
            return False
        num_blocks = self.kv.blocks_for(self._tokens_to_hold(request))
        return self.kv.num_unpromised - num_blocks >= self.limits.watermark_blocks

    def _may_join(self, request: Request) -> bool:
        """Keep a suspect apart from all but requests that got a token in this epoch.

        If the epoch ends again, it alone reaches MAX_SUSPICIONS.
        """
        running = self.running.values()
        if any(r.must_run_alone for r in running):
            return False
        return not request.must_run_alone or all(map(self._has_progressed, running))

    def _tokens_to_hold(self, request: Request) -> int:
        """Tokens whose room admission promises."""
        if needs_reservation(request):
            return request.max_total_tokens - 1
        return len(request.token_ids)

    # ---- results

    def commit(self, result: StepTokens) -> StepOutput:
        """Take the result of the oldest plan in flight; returns the tokens and who ended."""
        plan = self.in_flight.popleft()
        assert (plan.epoch, plan.step_id) == (result.epoch, result.step_id), (plan, result)
        rows, token_ids = plan.sampling_rows, result.token_ids
        assert len(rows) == len(token_ids), (len(rows), len(token_ids))
        tokens = TokenColumns()
        if result.failed_rows:
            self._fail_rows(plan, result.failed_rows, tokens)
        is_live = self.rows.generations[rows] == plan.sampling_generations
        if not is_live.all():
            self._commit_detached(plan, token_ids, tokens)
            rows, token_ids = rows[is_live], token_ids[is_live]
        positions = self.rows.num_tokens[rows]
        self.rows.tokens[rows, positions] = token_ids
        self.rows.num_tokens[rows] = positions + 1
        tokens.add(self.rows.frontends[rows], self.rows.request_ids[rows], token_ids)
        ends = self._is_stop_token[token_ids] | (positions + 1 >= self.rows.max_total_tokens[rows])
        for index in np.nonzero(ends)[0]:
            request = self._resident(rows[index])
            self._finish_if_ended(request, int(token_ids[index]), int(positions[index]) + 1, tokens)
        if self._suspects:
            self._clear_suspects()
        return tokens.build()

    def _commit_detached(self, plan: StepPlan, token_ids: TokenIds, tokens: TokenColumns) -> None:
        """Give preempted requests their tokens; drop those of requests that ended."""
        for row, generation, token_id in zip(
            plan.sampling_rows.tolist(), plan.sampling_generations.tolist(), token_ids, strict=True
        ):
            request = self._detached.get((row, generation))
            if request is None:
                continue
            if request.last_step_id == plan.step_id:
                del self._detached[row, generation]
            if not request.status.is_finished:
                request.token_ids = np.append(request.token_ids, token_id)
                request.num_suspicions = 0
                tokens.add([request.frontend], [request.request_id], [token_id])
                self._finish_if_ended(request, int(token_id), len(request.token_ids), tokens)

    def _finish_if_ended(
        self, request: Request, token_id: int, num_tokens: int, tokens: TokenColumns
    ) -> None:
        num_output_tokens = num_tokens - request.num_prompt_tokens
        if token_id in request.stop_token_ids:
            self.finish(request, RequestStatus.FINISHED_STOP)
            tokens.finished.append(Finished(request, num_output_tokens, stop_token_id=token_id))
        elif num_tokens >= request.max_total_tokens:
            self.finish(request, RequestStatus.FINISHED_LENGTH)
            tokens.finished.append(Finished(request, num_output_tokens))

    def _fail(self, request: Request, message: str, tokens: TokenColumns) -> None:
        self.finish(request, RequestStatus.FINISHED_ERROR)
        num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
        tokens.finished.append(Finished(request, num_output_tokens, error_message=message))

    def _fail_rows(self, plan: StepPlan, failed_rows: frozenset[int], tokens: TokenColumns) -> None:
        """End the requests whose logits were not finite; the others of the step go on."""
        for row, generation in zip(
            plan.sampling_rows.tolist(), plan.sampling_generations.tolist(), strict=True
        ):
            if row not in failed_rows:
                continue
            if self.rows.generations[row] == generation:
                request = self.rows.requests[row]
            else:
                request = self._detached.pop((row, generation), None)
            if request is not None and not request.status.is_finished:
                self._fail(request, "the model produced logits that are not finite", tokens)

    # ---- epochs

    def begin_epoch(self, epoch: int, limits: Limits) -> StepOutput:
        """Start over on an executor that holds nothing; every request keeps its tokens.

        Running requests return to the queue in order of arrival; longest outputs shrink to the new
        limits. Returns those that fail: in flight at MAX_SUSPICIONS epoch ends in a row, or
        already too long.
        """
        running = [*self.running.values(), *self._detached.values()]
        in_flight_rows = {int(row) for plan in self.in_flight for row in plan.rows}
        for request in running:
            if request.status.is_finished:
                continue
            request.num_recoveries += 1
            if request.status is RequestStatus.WAITING or request.row in in_flight_rows:
                request.num_suspicions += 1
                self._suspects.add(request)
            if request.status is RequestStatus.RUNNING:
                self.rows.leave(request)
                request.move_to(RequestStatus.WAITING)
                self.waiting.push(request)
        for request in self.waiting:
            request.last_step_id = 0  # step ids start again
        self.epoch = epoch
        self._set_limits(limits)
        return self._fail_hopeless()

    def _fail_hopeless(self) -> StepOutput:
        tokens = TokenColumns()
        for request in list(self.waiting):
            if request.num_suspicions >= MAX_SUSPICIONS:
                self._fail(request, "in flight each time the executor was lost", tokens)
            elif len(request.token_ids) >= self.limits.max_total_tokens:
                self._fail(request, "too long for the executor that replaced a lost one", tokens)
            else:
                longest = self.limits.max_total_tokens
                request.max_total_tokens = min(request.max_total_tokens, longest)
        self._suspects = {r for r in self._suspects if not r.status.is_finished}
        return tokens.build()

    def _clear_suspects(self) -> None:
        """A request that got a token in this epoch is not what ended the last one."""
        for request in list(self._suspects):
            if request.status.is_finished or self._has_progressed(request):
                request.num_suspicions = 0
            if not request.num_suspicions:
                self._suspects.remove(request)

    def _has_progressed(self, request: Request) -> bool:
        return request.row != NO_ROW and self.rows.num_tokens[request.row] > len(request.token_ids)

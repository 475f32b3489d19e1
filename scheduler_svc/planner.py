"""Deciding one step: who decodes, who prefills how much, who enters, who must give way."""

from __future__ import annotations

from typing import Final

import numpy as np

from scheduler_svc.batch import BatchBuilder
from scheduler_svc.beam_group import BeamGroup
from scheduler_svc.lifecycle import Lifecycle
from scheduler_svc.policy import needs_reservation, pick_victim
from scheduler_svc.request import Branch, RequestStatus, TokenIds
from scheduler_svc.step_plan import NewRow, RowIds

OVERLOAD_MEMORY_NS: Final = 30_000_000_000
"""So long after a sign of overload late requests stay out of a device that is half in use."""


class Planner:
    """Fills one batch; made anew for each plan."""

    def __init__(self, life: Lifecycle, batch: BatchBuilder, now_ns: int) -> None:
        """Plan into `batch`, which is empty."""
        self._life = life
        self._residents = life.residents
        self._rows = life.residents.rows
        self._kv = life.residents.kv
        self._batch = batch
        self._now_ns = now_ns
        self._has_preempted = False
        self._has_stalled = False

    def fill(self) -> None:
        """Decode rows come first, one token each; the rest of the token budget goes to prefills.

        Oldest first, then to admissions.
        """
        self._drop_hopeless()
        self._plan_decodes()
        for branch in list(self._residents.prefilling):
            if self._batch.budget and branch.status is RequestStatus.RUNNING:
                self._plan_prefill(branch)
        if self._may_admit:
            self._admit()

    @property
    def _may_admit(self) -> bool:
        """Who waits for blocks must get those that are freed, before anybody else enters."""
        return not (self._has_preempted or self._has_stalled)

    # ---- decoding

    def _plan_decodes(self) -> None:
        rows = self._schedulable_decodes()
        groups = [group for group in self._life.groups.values() if group.is_ready]
        grown = rows[self._kv.full(rows, self._rows.num_planned[rows])]
        num_missing = len(grown) + sum(g.num_blocks_needed(self._residents) for g in groups)
        if num_missing > self._kv.pool.num_free:
            rows = self._grow_under_pressure(rows, grown, groups)
        else:
            if len(grown):
                self._batch.append_one_each(grown, self._kv.grow_by_one(grown))
            for group in groups:
                group.plan_step(self._residents, self._batch)
        self._rows.num_planned[rows] += 1
        self._batch.set_decodes(rows)

    def _schedulable_decodes(self) -> RowIds:
        """Decode rows whose foreseen length is not reached yet [n]."""
        rows = self._residents.decoding
        ready = self._rows.num_planned[rows] < self._rows.max_total_tokens[rows] - 1
        return rows if ready.all() else rows[ready]

    def _grow_under_pressure(self, rows: RowIds, grown: RowIds, groups: list[BeamGroup]) -> RowIds:
        """Grow full rows and beam searches oldest first, preempting younger branches.

        Who finds no victim sits this step out: whoever is older goes on and will finish. Returns
        the rows that run.
        """
        stalled = set()
        growing: list[Branch | BeamGroup] = [self._rows.resident(row) for row in grown]
        growing += groups
        for each in sorted(growing, key=lambda each: each.age):
            if isinstance(each, BeamGroup):
                if not each.is_ready:
                    continue  # preempted for an older one just now
                if self._make_room(each.leader, each.num_blocks_needed(self._residents)):
                    each.plan_step(self._residents, self._batch)
                else:
                    self._has_stalled = True
            elif each.status is RequestStatus.RUNNING:
                if self._make_room(each, 1):
                    self._batch.append_blocks(each.row, self._kv.grow_by_one(np.array([each.row])))
                else:
                    stalled.add(each.row)
        self._has_stalled |= bool(stalled)
        runs = [r for r in rows if self._rows.branches[r] is not None and r not in stalled]
        return np.array(runs, np.int64)

    def _make_room(self, branch: Branch, num_blocks: int) -> bool:
        """Preempt until `num_blocks` are free; False if nobody is left to preempt."""
        if self._kv.pool.num_free >= num_blocks:
            return True
        scheduled = self._batch.scheduled_rows()
        while self._kv.pool.num_free < num_blocks:
            candidates = (
                other
                for other in self._residents.running.values()
                if not self._is_scheduled(other, scheduled)
            )
            victim = pick_victim(candidates, branch)
            if victim is None:
                return False
            self._life.preempt(victim)
            self._has_preempted = True
        return True

    def _is_scheduled(self, branch: Branch, scheduled: set[int]) -> bool:
        """Whether it is in the batch already; of a beam search, whether any lane is."""
        if branch.request.beam is None:
            return branch.row in scheduled
        return any(lane.row in scheduled for lane in branch.request.branches)

    # ---- prefill

    def _plan_prefill(self, branch: Branch) -> None:
        """Schedule the next chunk of a row, as long as budget and free blocks allow."""
        row, rows, kv = branch.row, self._rows, self._kv
        is_new = not rows.is_known[row]
        if is_new and not kv.num_blocks[row] and not self._adopt(branch):
            return
        start, end = int(rows.num_planned[row]), int(rows.num_tokens[row])
        chunk = min(self._batch.budget, end - start)
        if not self._make_room(branch, kv.missing(row, start + chunk)):
            room = (int(kv.num_blocks[row]) + kv.pool.num_free) * kv.block_size
            chunk = min(chunk, room - start)
        if chunk <= 0:
            self._has_stalled = True
            return
        new_block_ids = kv.grow(row, max(start + chunk, self._reserved_tokens(branch)))
        if is_new:
            token_ids = rows.tokens[row, start:end].copy()
            self._begin_row(branch, start, token_ids)
        elif len(new_block_ids):
            self._batch.append_blocks(row, new_block_ids)
        self._batch.add_prefill(row, chunk, samples=start + chunk == end)
        rows.num_planned[row] = start + chunk
        self._residents.name_blocks(branch, start + chunk)
        if start + chunk == end:
            self._end_prefill(branch)

    def _begin_row(
        self,
        branch: Branch,
        num_computed_tokens: int,
        token_ids: TokenIds,
        logits_from: int | None = None,
    ) -> None:
        """Tell the executor of a row."""
        row = branch.row
        self._rows.is_known[row] = True
        self._batch.add_row(
            NewRow(
                row,
                branch,
                num_computed_tokens,
                token_ids,
                self._kv.table(row).copy(),
                int(self._rows.num_candidates[row]),
                logits_from,
            )
        )

    def _adopt(self, branch: Branch) -> bool:
        """Start with what the prefix cache has; False if the branch must wait.

        A beam waits for those before it in its search, whose blocks it shares: to compute them
        again would take memory that its admission did not count on.
        """
        kv, counters, request = self._kv, self._life.counters, branch.request
        if next(b for b in self._residents.prefilling if b.request is request) is not branch:
            return False
        found = kv.find(branch)
        # What somebody holds takes no block; what is not cached takes one at least.
        num_blocks = len(found) - kv.num_held(found) + 1
        if kv.pool.num_free < num_blocks:
            self._make_room(branch, num_blocks)
            found = kv.find(branch)  # a victim's blocks may have taken the place of others
            while found and len(found) - kv.num_held(found) >= kv.pool.num_free:
                found.pop()
        if not kv.pool.num_free:
            self._has_stalled = True
            return False
        kv.adopt(branch.row, branch, found)
        num_cached = len(found) * kv.block_size
        self._rows.num_planned[branch.row] = num_cached
        num_from_host = sum(block.is_on_host for block in found) * kv.block_size
        counters.num_queried_tokens += len(branch.token_ids)
        counters.num_hit_tokens_host += num_from_host
        counters.num_hit_tokens_device += num_cached - num_from_host
        if not request.first_admitted_ns:
            request.first_admitted_ns = self._now_ns
            request.num_cached_tokens = num_cached
            request.blocks.num_shared += (num_cached - num_from_host) // kv.block_size
        return True

    def _end_prefill(self, branch: Branch) -> None:
        self._residents.prefilling.remove(branch)
        request = branch.request
        if request.beam is not None:
            return
        self._residents.begin_decoding(branch)
        if not request.is_spawned:
            request.is_spawned = True
            for sample in request.branches[1:]:
                if not sample.status.is_finished:
                    self._spawn(sample, branch)

    def _spawn(self, sample: Branch, leader: Branch) -> None:
        """Let a sample begin in this plan with the leader's blocks and logits, if it has room."""
        kv, rows = self._kv, self._rows
        num_tokens = leader.request.num_prompt_tokens
        reserved = self._reserved_tokens(sample)
        num_shared = num_tokens // kv.block_size
        num_blocks = self._life.limits.blocks_for(max(num_tokens, reserved)) - num_shared
        must_wait = not self._may_admit or not self._may_join(sample)
        if must_wait or not rows.num_free or max(1, num_blocks) > self._num_spare:
            self._life.spawn(sample)
            return
        sample.block_hashes = leader.block_hashes.copy()
        row = self._residents.enter(sample, num_blocks, int(rows.num_candidates[leader.row]))
        kv.fork(leader.row, sample, num_tokens, is_now=False)
        kv.grow(row, reserved)
        rows.num_planned[row] = num_tokens
        self._begin_row(sample, num_tokens, np.empty(0, np.int32), logits_from=leader.row)
        self._residents.begin_decoding(sample)

    # ---- admission

    def _drop_hopeless(self) -> None:
        """Who cannot meet its deadline any more leaves before its prefill; who hardly can yields.

        Only the next in line is looked at: nobody else is about to cost anything.
        """
        waiting, now_ns = self._life.waiting, self._now_ns
        while len(waiting) and (branch := waiting.peek()) is not None:
            request = branch.request
            if request.place or not request.deadline_ns or now_ns <= request.latest_start_ns:
                return
            if not request.is_late:
                self._life.note_overload(request)
            if now_ns + self._soonest_ns(branch) > request.deadline_ns:
                self._life.expire(request)
            elif request.is_late:
                return
            else:
                waiting.demote()

    def _soonest_ns(self, branch: Branch) -> float:
        """Time of the prefill of what is not cached, if nothing else ran; 0: no price is known."""
        num_cached = len(self._kv.find(branch)) * self._kv.block_size
        num_tokens = max(1, branch.request.num_prompt_tokens - num_cached)
        return self._life.cost_model.step_time_ns(num_tokens, 0, 0)  # a lower bound: no pairs

    def _admit(self) -> None:
        """Let waiting branches in, in order, as far as rows, budget and blocks allow."""
        policy, rows = self._life.policy, self._rows
        if policy.is_static and self._residents.running:
            return
        while (self._batch.budget or policy.is_static) and rows.num_free and self._may_admit:
            branch = self._life.waiting.peek()
            if branch is None or not self._may_enter(branch):
                return
            counts = self._blocks_to_enter(branch)
            # Alone it fits, or it would not have been queued.
            if self._residents.running and sum(counts) > self._num_spare:
                return
            self._life.waiting.pop()
            self._life.take_place(branch.request)
            self._enter(branch, counts)

    def _enter(self, branch: Branch, counts: list[int]) -> None:
        """Give the branch, or every lane of its beam search, a row; who holds tokens prefills."""
        branches, num_candidates = [branch], _num_candidates(branch)
        live = branches
        if (group := self._life.groups.get(branch.request.key)) is not None:
            branches, num_candidates = group.lanes, group.num_candidates
            live = group.live_lanes()
        for each, num_blocks in zip(branches, counts, strict=True):
            self._residents.enter(each, num_blocks, num_candidates)
        self._residents.prefilling += live
        for each in live:
            if self._batch.budget:
                self._plan_prefill(each)

    def _may_enter(self, branch: Branch) -> bool:
        """Whether anything but blocks keeps it out."""
        if branch.last_step_id > self._committed_step_id:
            return False  # its tokens under way must be known first
        if not self._residents.running:
            return True
        if self._rows.num_free < branch.request.width or not self._may_join(branch):
            return False
        if branch.request.is_late and not branch.request.place and self._is_overloaded:
            return False
        return self._num_spare > 0  # whatever is cached, it needs a block

    @property
    def _is_overloaded(self) -> bool:
        """Whether there was a sign of overload lately, and half of the rows or blocks are in use.

        One more row then makes others late too.
        """
        overloaded_ns = self._life.overloaded_ns
        if not overloaded_ns or self._now_ns - overloaded_ns > OVERLOAD_MEMORY_NS:
            return False
        num_running, pool = len(self._residents.running), self._kv.pool
        are_rows = 2 * num_running >= self._life.limits.max_num_seqs
        return are_rows or 2 * pool.num_free < pool.num_usable

    @property
    def _num_spare(self) -> int:
        """Blocks that whoever enters may count on, beside others."""
        return self._kv.num_unpromised - self._life.limits.watermark_blocks

    @property
    def _committed_step_id(self) -> int:
        in_flight = self._residents.in_flight
        return (in_flight[0].step_id if in_flight else self._batch.step_id) - 1

    def _may_join(self, branch: Branch) -> bool:
        """Keep a suspect apart from all but branches that got a token in this epoch.

        If the epoch ends again, it alone reaches MAX_SUSPICIONS.
        """
        if not self._life.suspects:
            return True
        running = self._residents.running.values()
        if any(other.must_run_alone for other in running):
            return False
        return not branch.must_run_alone or all(map(self._residents.has_progressed, running))

    def _blocks_to_enter(self, branch: Branch) -> list[int]:
        """Free blocks that admission promises each row: for the tokens known, or the worst case."""
        if (group := self._life.groups.get(branch.request.key)) is not None:
            return group.blocks_to_enter(self._residents, self._group_reservation(group))
        num_tokens = max(len(branch.token_ids), self._reserved_tokens(branch))
        if needs_reservation(branch):
            num_tokens = max(num_tokens, branch.max_total_tokens - 1)
        num_held = self._kv.num_held(self._kv.find(branch))
        return [self._life.limits.blocks_for(num_tokens) - num_held]

    def _reserved_tokens(self, branch: Branch) -> int:
        """Tokens whose blocks the policy hands out at admission."""
        reserve_tokens = self._life.policy.reserve_tokens
        if reserve_tokens is None:
            return 0
        return min(reserve_tokens(branch.request), self._life.limits.max_total_tokens - 1)

    def _group_reservation(self, group: BeamGroup) -> int | None:
        if needs_reservation(group.leader) or self._life.policy.reserve_tokens is not None:
            return group.request.max_total_tokens - 1
        return None


def _num_candidates(branch: Branch) -> int:
    """Likeliest tokens to ask for with each token; at least one brings the token's own."""
    num_logprobs = branch.request.sampling.num_logprobs
    return max(1, num_logprobs - 1) if num_logprobs else 0

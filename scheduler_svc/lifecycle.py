"""What becomes of requests: queued, preempted, ended. The state that planning and results share."""

from __future__ import annotations

from typing import Final

import numpy as np

from scheduler_svc.accounting import Counters
from scheduler_svc.beam_group import BeamGroup
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.pace import Pace
from scheduler_svc.policy import Policy, PreemptionMode, should_swap
from scheduler_svc.prefix_cache import private_root_hash
from scheduler_svc.request import Branch, Request, RequestStatus
from scheduler_svc.residents import Residents
from scheduler_svc.step_plan import Finished, TokenColumns
from scheduler_svc.waiting_queue import MAX_OVERTAKEN_NS, WaitingQueue

_SMALL_PART: Final = 0.1
"""Of the time between arrival and deadline: who is cancelled in the last of it has missed the
deadline, and who has run out of slack in the first of it never had much."""


class Lifecycle:
    """Requests and their branches: the only place where a status changes but on entering a row."""

    def __init__(self, limits: Limits, policy: Policy) -> None:
        """Start with nothing."""
        self.limits = limits
        self.policy = policy
        self.cost_model = CostModel()
        self.counters = Counters()
        self.waiting = WaitingQueue()
        self.pace = Pace()
        self.now_ns = 0  # of the newest plan
        self.overloaded_ns = 0  # when the last sign of overload came; 0: there was none
        self.expired: list[Request] = []  # dropped, and not told to the caller yet
        self._num_places = 0
        self.groups: dict[int, BeamGroup] = {}  # by request key: beam searches, in order of arrival
        self.suspects: set[Branch] = set()  # with num_suspicions > 0
        self.is_stop_token = np.zeros(limits.vocab_size, np.bool_)  # of any request so far
        self.residents = Residents(limits, is_caching=policy.is_caching)
        self.set_cost_model(self.cost_model)

    def begin_epoch(self, limits: Limits) -> None:
        """Start over on an executor that holds nothing. Whoever ran is the caller's business."""
        self.limits = limits
        self.residents = Residents(limits, is_caching=self.policy.is_caching)
        self.set_cost_model(self.cost_model)

    def set_cost_model(self, cost_model: CostModel) -> None:
        """Take new prices; with AUTO they also tell whether the host is worth it for the cache."""
        self.cost_model = cost_model
        mode = self.policy.preemption
        is_cheap = should_swap(mode, cost_model, self.limits, 1, 0)
        is_wanted = is_cheap or mode is not PreemptionMode.AUTO
        self.residents.kv.keeps_evicted = is_wanted and self.policy.is_caching

    def rename_waiting(self) -> None:
        """The block size changed: give the blocks of waiting branches their new names."""
        for branch in self.waiting:
            branch.block_hashes = []
            if (group := self.groups.get(branch.request.key)) is not None:
                group.forget_hashes()
                group.lay_out(self.residents)
            self.residents.hash_blocks(branch, len(branch.token_ids))

    # ---- into the queue

    def submit(self, request: Request) -> None:
        """Queue a request that the limits can hold."""
        assert request.num_prompt_tokens < request.max_total_tokens <= self.limits.max_total_tokens
        self.is_stop_token[list(request.stop_token_ids)] = True
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        if not self.policy.is_caching:
            request.cache_root = private_root_hash(request.key)
        if request.beam is not None:
            self.groups[request.key] = BeamGroup(request)
        request.latest_start_ns = self._latest_start_ns(request)
        self.queue(request.branches[0])

    def _latest_start_ns(self, request: Request) -> int:
        if not request.deadline_ns:
            return request.arrival_ns + MAX_OVERTAKEN_NS
        service_ns = max(
            self.pace.expected_ns(request.max_total_tokens - request.num_prompt_tokens),
            self.cost_model.prefill_time_ns(request.num_prompt_tokens),
        )
        return request.deadline_ns - int(service_ns)

    def take_place(self, request: Request) -> None:
        """A branch of the request enters; if it is the first one, that gives the request's age."""
        if not request.place:
            self._num_places += 1
            request.place = self._num_places

    def abort(self, request: Request) -> None:
        """End a request whose client has left."""
        patience_ns = request.deadline_ns - request.arrival_ns
        if request.deadline_ns - self.now_ns <= _SMALL_PART * patience_ns:
            self.note_overload(request)
        self.end_request(request, RequestStatus.FINISHED_ABORTED)

    def note_overload(self, request: Request) -> None:
        """A request misses its deadline: a sign of overload, if only because it had to wait."""
        patience_ns = request.deadline_ns - request.arrival_ns
        has_waited = self.now_ns - request.arrival_ns > _SMALL_PART * patience_ns
        if request.deadline_ns and has_waited and request.arrival_ns <= request.latest_start_ns:
            self.overloaded_ns = self.now_ns

    def expire(self, request: Request) -> None:
        """Drop a request that has not run and can no longer meet its deadline."""
        assert not request.place
        self.drop(request)
        self.expired.append(request)

    def drop(self, request: Request) -> None:
        """End a request for its deadline."""
        self.end_request(request, RequestStatus.FINISHED_ABORTED)
        self.counters.num_expired += 1

    def queue(self, branch: Branch) -> None:
        """Put a waiting branch, or the leader of a waiting beam search, into the queue."""
        if (group := self.groups.get(branch.request.key)) is not None:
            group.lay_out(self.residents)
        self.residents.hash_blocks(branch, len(branch.token_ids))
        self.waiting.push(branch)

    def preempt(self, victim: Branch) -> None:
        """Send a running branch, or the whole beam search it is of, back to the queue.

        Its KV is swapped out if that is the cheaper way to have it again, else recomputed.
        """
        group = self.groups.get(victim.request.key)
        if group is not None:
            group.settle()
        branches = group.lanes if group is not None else [victim]
        is_swapped = False
        for branch in branches:
            if group is None:
                self.residents.detach(branch)
            is_swapped |= self._swap_out(branch)
            self.residents.release(branch)
            branch.move_to(RequestStatus.WAITING)
            branch.num_preemptions += 1
        self.counters.num_preemptions_by_swap += is_swapped
        self.counters.num_preemptions_by_recompute += not is_swapped
        self.queue(branches[0])

    def _swap_out(self, branch: Branch) -> bool:
        """Copy what only this branch holds to the host, if that pays and there is room."""
        kv, limits = self.residents.kv, self.limits
        if not limits.num_host_blocks:
            return False
        hashes = self.residents.settle(branch)
        num_blocks = len(kv.private_blocks(branch.row, hashes))
        if not 0 < num_blocks <= kv.host.num_free:
            return False
        num_before = (len(hashes) - num_blocks) * limits.block_size
        mode = self.policy.preemption
        if not should_swap(mode, self.cost_model, limits, num_blocks, num_before):
            return False
        kv.swap_out(branch.row, branch, hashes)
        return True

    def spawn(self, branch: Branch) -> None:
        """Queue a sample that found no room beside its first one; it finds the prompt cached."""
        branch.block_hashes = branch.request.branches[0].block_hashes.copy()
        self.queue(branch)

    # ---- out of it

    def end(self, branch: Branch, status: RequestStatus, *, is_valid: bool = True) -> None:
        """End a branch now; tokens still under way for it are dropped.

        Its blocks stay cached unless its KV is not `is_valid`.
        """
        if branch.status is RequestStatus.RUNNING:
            self.residents.detach(branch)
            self.residents.release(branch)
        if not is_valid:
            self.residents.kv.forget_blocks(branch.block_hashes)
        self.residents.kv.unpin(branch)
        branch.move_to(status)
        if branch.is_queued:
            self.waiting.discard(branch)

    def end_request(
        self, request: Request, status: RequestStatus, *, is_valid: bool = True
    ) -> None:
        """End all branches of a request that have not ended."""
        group = self.groups.pop(request.key, None)
        if group is not None and group.leader.status is RequestStatus.RUNNING:
            group.settle()
        for branch in request.branches:
            if not branch.status.is_finished:
                self.end(branch, status, is_valid=is_valid)
        self.counters.num_finished += 1

    def end_branch(
        self,
        branch: Branch,
        status: RequestStatus,
        num_output_tokens: int,
        stop_token_id: int | None = None,
    ) -> Finished:
        """End one sample, with so many output tokens."""
        self.end(branch, status)
        if branch.request.first_admitted_ns:
            service_ns = self.now_ns - branch.request.first_admitted_ns
            self.pace.observe(
                service_ns,
                num_output_tokens,
                branch.max_total_tokens - branch.request.num_prompt_tokens,
            )
        is_last = branch.request.is_finished
        self.counters.num_finished += is_last
        return Finished(
            branch.request,
            branch.index,
            status,
            num_output_tokens,
            is_last=is_last,
            stop_token_id=stop_token_id,
        )

    def fail(self, branch: Branch, message: str, tokens: TokenColumns) -> None:
        """End a request with an error, for one of its branches failed."""
        self.end_request(branch.request, RequestStatus.FINISHED_ERROR, is_valid=False)
        tokens.finished.append(
            Finished(
                branch.request,
                branch.index,
                RequestStatus.FINISHED_ERROR,
                len(branch.token_ids) - branch.request.num_prompt_tokens,
                error_message=message,
            )
        )

"""The scheduler's half: recorded inputs go into a new scheduler, whose plans must be the old ones.

Prefix-cache keys are drawn anew in each process, so that a plan that depended on them would show.
"""

from __future__ import annotations

import dataclasses
import hashlib
import traceback
from collections import deque
from collections.abc import Sequence

from blockyard.engine.v1 import engine_pb2
from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.replay.difference import Difference, Steps, compare
from scheduler_svc import plan_codec
from scheduler_svc.cost_model import CostModel
from scheduler_svc.engine.admission import build_request
from scheduler_svc.errors import RequestError
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log import limits_of
from scheduler_svc.plan_log_reader import Event
from scheduler_svc.policy import Policy
from scheduler_svc.request import MAX_BRANCHES, Request, TokenIds
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Finished


class _DivergedError(Exception):
    """A recorded event cannot happen now."""


class SchedulerReplay:
    """Feed it every event of a log, in order, until it returns a difference."""

    def __init__(self, policy: Policy, steps: Steps) -> None:
        """Nothing is planned yet.

        Args:
            policy: that the log was recorded with.
            steps: which plans to compare.
        """
        self.num_plans = 0
        self._policy = policy
        self._steps = steps
        self._scheduler: Scheduler | None = None
        self._requests: dict[int, Request] = {}  # by key; those that have not ended
        # One event is held back until what the scheduler was told while it acted on it is known.
        self._held: Event | None = None
        self._answers: deque[bool] = deque()
        self._made: pb.StepPlan | None = None  # and not yet compared
        self._hash = hashlib.sha256()

    @property
    def summary(self) -> str:
        """What was found equal so far."""
        first = self._steps.first
        since = f" from step {first} on" if first > 1 else ""
        return f"{self.num_plans} plans identical{since}, sha256 {self._hash.hexdigest()}"

    @property
    def is_done(self) -> bool:
        """Whether the last plan to compare was compared."""
        return self._steps.are_over(self.num_plans)

    def apply(self, event: Event) -> Difference | None:
        """Take what happened next; returns what came out otherwise, after which it must end."""
        if isinstance(event, log_pb.LoggedTextStop):
            self._answers.append(event.is_stopped)
            return None
        held, self._held = self._held, event
        return self._do(held) if held is not None else None

    def finish(self) -> Difference | None:
        """The log ends here; that the last plan's record was not written is no difference."""
        return self._do(self._held) if self._held is not None else None

    def _do(self, event: Event) -> Difference | None:
        made, self._made = self._made, None
        if isinstance(event, pb.StepPlan):
            return self._compare(event, made)
        if made is not None:
            self.num_plans += 1
            return self._difference(made, ["a plan now, none recorded"])
        try:
            self._act(event)
            if self._answers:
                raise _DivergedError("fewer texts of beams are looked at now")
        except _DivergedError as error:
            return self._after_last(str(error))
        except AssertionError as error:  # the scheduler's way to end: the recording's too, perhaps
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.name}, {place.filename}:{place.lineno}"
            return self._after_last(f"{type(error).__name__} in {where}: {error}")
        return None

    def _act(self, event: Event) -> None:
        """Raises AssertionError as the scheduler does, and _DivergedError."""
        if isinstance(event, log_pb.EpochBegin):
            limits = limits_of(event.limits)
            if self._scheduler is None:
                self._scheduler = Scheduler(limits, self._policy)
            self._forget(self._scheduler.begin_epoch(event.epoch, limits).finished)
            return
        scheduler = self._scheduler
        assert scheduler is not None, "the reader has seen an epoch begin"
        if isinstance(event, log_pb.LoggedSubmit):
            request = self._requests[event.key] = self._request(event, scheduler.limits)
            scheduler.submit(request)
        elif isinstance(event, log_pb.LoggedStop):
            self._stop(scheduler, event)
        elif isinstance(event, log_pb.PlanCall):
            plan = scheduler.plan(event.now_ns)
            self._made = None if plan is None else plan_codec.encode(plan)
            for request in scheduler.take_expired():
                del self._requests[request.key]
        elif isinstance(event, pb.StepResult):
            self._forget(scheduler.commit(plan_codec.decode(event)).finished)
        elif isinstance(event, pb.CostModel):
            scheduler.set_cost_model(CostModel.of(event))
        elif isinstance(event, engine_pb2.FlushCacheRequest):
            scheduler.flush_cache()

    def _request(self, event: log_pb.LoggedSubmit, limits: Limits) -> Request:
        try:
            return build_request(
                event.submit,
                # How many branches a request may have was asked then; the scheduler takes any.
                dataclasses.replace(
                    limits, max_num_seqs=MAX_BRANCHES, max_num_batched_tokens=MAX_BRANCHES
                ),
                key=event.key,
                frontend=event.frontend,
                now_ns=event.arrival_ns,
                deadline_ns=event.deadline_ns,
                text_stop=lambda _stop_strings: self._is_text_stopped,
            )
        except RequestError as error:
            raise _DivergedError(f"request {event.key} is refused now: {error}") from error

    def _is_text_stopped(self, _token_ids: TokenIds) -> bool:
        if not self._answers:
            raise _DivergedError("more texts of beams are looked at now")
        return self._answers.popleft()

    def _stop(self, scheduler: Scheduler, event: log_pb.LoggedStop) -> None:
        request = self._requests.get(event.key)
        if request is None:
            raise _DivergedError(f"request {event.key}, stopped then, has ended before now")
        if not event.num_output_tokens:
            del self._requests[event.key]
            scheduler.abort(request)
            return
        branch = request.branches[event.branch]
        if branch.status.is_finished:
            raise _DivergedError(f"branch {event.branch} of request {event.key} has ended before")
        self._forget([scheduler.stop(branch, event.num_output_tokens)])

    def _forget(self, finished: Sequence[Finished]) -> None:
        for end in finished:
            if end.is_last:
                self._requests.pop(end.request.key, None)

    def _after_last(self, detail: str) -> Difference:
        """Something that happened after the newest plan."""
        scheduler = self._scheduler
        epoch, step_id = (scheduler.epoch, scheduler.last_step_id) if scheduler else (0, 0)
        return Difference(self.num_plans, epoch, step_id, [f"after it: {detail}"])

    def _difference(self, plan: pb.StepPlan, details: Sequence[str]) -> Difference:
        return Difference(self.num_plans, plan.epoch, plan.step_id, details)

    def _compare(self, recorded: pb.StepPlan, made: pb.StepPlan | None) -> Difference | None:
        self.num_plans += 1
        if made is None:
            return self._difference(recorded, ["a plan recorded, none now"])
        data = made.SerializeToString(deterministic=True)
        self._hash.update(data)
        if self.num_plans < self._steps.first:
            return None
        if data == recorded.SerializeToString(deterministic=True):
            return None
        return self._difference(recorded, list(compare(recorded, made)))

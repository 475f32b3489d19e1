"""What the engine notes of steps and requests while they happen.

Observes, like tracing; the scheduler knows nothing of it. A step costs some 5 us with 256 rows:
what is counted for each token is counted in columns, and what for each step, many steps at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from blockyard.executor.v1 import executor_pb2
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.rows import Rows
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Finished, RowIds, StepPlan
from scheduler_svc.telemetry import buckets
from scheduler_svc.telemetry.histogram import Histogram

FINISHED_REASONS: Final = {
    RequestStatus.FINISHED_STOP: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}
"""As vLLM calls them."""


class _Step(NamedTuple):
    """What is to be remembered of a plan until its result comes."""

    num_tokens: int
    num_again: int  # tokens that were computed before a preemption or a recovery
    swap_ns: float | None  # how long its swaps should take; None: it has none
    is_after_rest: bool  # there was nothing to do before it


class MetricsRecorder:
    """Histograms and counters since the engine started."""

    def __init__(self) -> None:
        # Steps [s].
        self.plan = Histogram(buckets.STEP)
        self.encode = Histogram(buckets.STEP)
        self.commit = Histogram(buckets.STEP)
        self.window_bubble = Histogram(buckets.STEP)
        self.step_tokens = Histogram(buckets.STEP_TOKENS)
        self.inter_token = Histogram(buckets.INTER_TOKEN)
        # The executor's time [ns]; of the device's by what it does, which does not overlap.
        self.apply_ns = 0
        self.device_ns = {"forward": 0, "sample": 0, "idle": 0}
        # What preemptions and lost executors cost [ns].
        self.swap_ns = 0.0
        self.num_recomputed_tokens = 0
        self.recompute_ns = 0.0
        # Branches, by how they ended.
        self.ended = Counter(dict.fromkeys(FINISHED_REASONS.values(), 0))
        self.generation_tokens = Histogram(buckets.TOKENS)
        # Requests that ended by themselves [s, tokens].
        self.queue = Histogram(buckets.REQUEST)
        self.prefill = Histogram(buckets.REQUEST)
        self.decode = Histogram(buckets.REQUEST)
        self.inference = Histogram(buckets.REQUEST)
        self.prompt_tokens = Histogram(buckets.TOKENS)
        self.longest_output = Histogram(buckets.TOKENS)
        self.max_tokens = Histogram(buckets.TOKENS)
        self.num_choices = Histogram(buckets.NUM_CHOICES)
        self.num_cached_tokens = 0

        self._arrived_ns = -1  # the newest result
        # Rows.num_left then, if all rows of that step got a token; else -1. While nobody else
        # leaves, the rows of a step with the same batch all had their last token then.
        self._steady_num_left = -1
        self._steps: deque[_Step] = deque()  # in flight
        self._is_resting = True
        self._trace_ids: dict[int, bytes] = {}  # of traced requests, by key
        self._longest: dict[int, int] = {}  # output of ended branches; of several, by key

    # ---- requests

    def queued(self, request: Request, trace_id: bytes) -> None:
        """A request is in the queue; `trace_id` is empty unless it is traced."""
        if trace_id:
            self._trace_ids[request.key] = trace_id

    def aborted(self, request: Request) -> None:
        """A request ended because nobody wants its output any more."""
        self.ended["abort"] += 1
        self._forget(request)

    def expired(self, request: Request) -> None:
        """A request was dropped for its deadline, before its prefill."""
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._trace_ids.pop(request.key, None)
        self._longest.pop(request.key, None)

    def finished(self, finished: Finished, now_ns: int) -> None:
        """A branch ended by itself, perhaps the last one of its request."""
        request, num_tokens = finished.request, finished.num_output_tokens
        self.ended[FINISHED_REASONS[finished.status]] += 1
        self.generation_tokens.observe(num_tokens)
        longest = max(num_tokens, self._longest.get(request.key, 0))
        if finished.is_last:
            self._finished_request(request, longest, now_ns)
            self._forget(request)
        else:
            self._longest[request.key] = longest

    def _finished_request(self, request: Request, longest: int, now_ns: int) -> None:
        self.longest_output.observe(longest)
        self.prompt_tokens.observe(request.num_prompt_tokens)
        self.max_tokens.observe(request.max_total_tokens - request.num_prompt_tokens)
        beam = request.beam
        self.num_choices.observe(request.num_samples if beam is None else beam.num_returned)
        self.num_cached_tokens += request.num_cached_tokens
        admitted_ns = request.first_admitted_ns
        if not admitted_ns:
            return
        first_ns = request.first_token_ns or now_ns
        trace_id = self._trace_ids.get(request.key, b"")
        self.queue.observe((admitted_ns - request.arrival_ns) / 1e9, trace_id)
        self.prefill.observe((first_ns - admitted_ns) / 1e9, trace_id)
        self.decode.observe((now_ns - first_ns) / 1e9, trace_id)
        self.inference.observe((now_ns - admitted_ns) / 1e9, trace_id)

    # ---- steps

    def planned(self, plan: StepPlan, scheduler: Scheduler, times_ns: tuple[int, int, int]) -> None:
        """A plan was sent.

        Args:
            plan: it.
            scheduler: whose plan it is.
            times_ns: when planning began, when it was done, and when the plan was encoded.
        """
        began_ns, planned_ns, encoded_ns = times_ns
        self.plan.observe_later((planned_ns - began_ns) / 1e9)
        self.encode.observe_later((encoded_ns - planned_ns) / 1e9)
        num_again, swap_ns = 0, None
        if plan.num_scheduled_tokens:
            num_again = _num_again(plan, scheduler.rows)
        if num_blocks := len(plan.moves.swap_in) + len(plan.moves.swap_out):
            swap_ns = scheduler.swap_time_ns(num_blocks)
        self._steps.append(_Step(plan.num_tokens, num_again, swap_ns, self._is_resting))
        self._is_resting = False

    def arrived(self, plan: StepPlan, rows: Rows, now_ns: int) -> None:
        """The result of a plan is here and will be committed now.

        The time between two tokens of a branch includes its preemptions. A token that was under
        way while its branch was preempted is not counted.
        """
        sampling = plan.sampling_rows
        if not len(sampling):
            return
        before_ns, self._arrived_ns = self._arrived_ns, now_ns
        if plan.same_batch and rows.num_left == self._steady_num_left:
            rows.last_token_ns[sampling] = now_ns
            self.inter_token.observe_times((now_ns - before_ns) / 1e9, len(sampling))
            return
        is_live = rows.generations.take(sampling) == plan.sampling_generations
        self._steady_num_left = -1
        if np.count_nonzero(is_live) < len(sampling):
            sampling = sampling[is_live]
        elif len(sampling) == len(plan.rows):
            self._steady_num_left = rows.num_left
        last_ns = rows.last_token_ns.take(sampling)
        rows.last_token_ns[sampling] = now_ns
        # Nearly all had their last token with the result before this one.
        is_usual = last_ns == before_ns
        num_usual = int(np.count_nonzero(is_usual))
        self.inter_token.observe_times((now_ns - before_ns) / 1e9, num_usual)
        if num_usual < len(sampling):
            self._note_others(rows, sampling[~is_usual], last_ns[~is_usual], now_ns)

    def _note_others(
        self, rows: Rows, sampling: RowIds, last_ns: npt.NDArray[np.int64], now_ns: int
    ) -> None:
        """Rows that get their first token, or whose last one is older; parallel [n]."""
        for row, before_ns in zip(sampling.tolist(), last_ns.tolist(), strict=True):
            if before_ns:
                self.inter_token.observe((now_ns - before_ns) / 1e9)
                continue
            request = rows.resident(row).request
            request.first_token_ns = request.first_token_ns or now_ns

    def committed(
        self, timings: executor_pb2.StepTimings, commit_ns: int, *, is_resting: bool
    ) -> None:
        """The result of the oldest plan in flight was committed.

        Args:
            timings: the executor's.
            commit_ns: how long decoding and committing took.
            is_resting: nothing is in flight now: there is nothing to do.
        """
        step = self._steps.popleft()
        self._is_resting = is_resting
        self.commit.observe_later(commit_ns / 1e9)
        self.apply_ns += timings.apply_ns
        if step.swap_ns is not None:
            self.swap_ns += timings.move_ns or step.swap_ns
        if not step.num_tokens:
            return
        self.step_tokens.observe_later(step.num_tokens)
        forward_ns, idle_ns = timings.forward_ns, timings.idle_ns
        device_ns = self.device_ns
        device_ns["forward"] += forward_ns
        device_ns["sample"] += timings.sample_ns
        device_ns["idle"] += idle_ns
        if not step.is_after_rest:
            self.window_bubble.observe_later(idle_ns / 1e9)
        if step.num_again:
            self.num_recomputed_tokens += step.num_again
            self.recompute_ns += forward_ns * step.num_again / step.num_tokens

    def epoch_ended(self) -> None:
        """The executor was lost: what was in flight will never be committed."""
        self._steps.clear()
        self._is_resting = True
        self._steady_num_left = -1


def _num_again(plan: StepPlan, rows: Rows) -> int:
    """Tokens in a plan of prefills that begin again, after a preemption or a lost executor."""
    total = 0
    prefill_rows = plan.rows[plan.num_decode_rows :].tolist()
    for row, num_tokens in zip(prefill_rows, plan.num_scheduled_tokens, strict=True):
        branch = rows.resident(row)
        if branch.num_preemptions or branch.num_recoveries:
            total += num_tokens
    return total

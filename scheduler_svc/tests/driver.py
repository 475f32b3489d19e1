"""Drives a scheduler one step at a time; the executor is a script that the test writes.

After each call the books are checked: conservation of both pools, the accounting's sum, and that
the tables which the plans so far describe are the tables that the scheduler has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from scheduler_svc.beam import BeamParams
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Branch, Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import NewRow, StepOutput, StepPlan, StepTokens

EOS: Final = 2
TOKEN: Final = 100
"""What every row samples unless told otherwise."""

PLAN_NS: Final = 1000
"""What the clock advances by with each call of `plan`."""

Scores = Mapping[int, float]
"""Candidates of one row: token id -> log-probability."""

_LIMITS: Final = {
    "num_device_blocks": 33,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "vocab_size": 256,
}
_FILLER: Final = 200
"""Candidates that a row has beside those of its script: this id and the next ones."""


def make_request(
    key: int, prompt: Sequence[int] = (1,), max_tokens: int = 8, **fields: Any
) -> Request:
    """A request; `fields` are other ones of its own."""
    return Request(
        **{
            "key": key,
            "frontend": 0,
            "request_id": key,
            "prompt": np.array(prompt, np.int32),
            "max_total_tokens": len(prompt) + max_tokens,
            "arrival_ns": 0,
            **fields,
        }
    )


class Driver:
    """A scheduler with its own clock, and answers to its plans."""

    def __init__(self, policy: Policy | None = None, **limits: int) -> None:
        self.limits = Limits(**{**_LIMITS, **limits})
        self.scheduler = Scheduler(self.limits, policy)
        self.scheduler.begin_epoch(1, self.limits)
        self.requests: list[Request] = []
        self.now_ns = 0
        self._tables: dict[int, list[int]] = {}  # by row, as the plans sent so far say

    def submit(self, prompt: int | Sequence[int], max_tokens: int = 8, **fields: Any) -> Request:
        """Queue a request; a length stands for a prompt that begins like no other one's."""
        key = len(self.requests) + 1
        if isinstance(prompt, int):
            prompt = [10 + (7 * key + i) % 90 for i in range(prompt)]
        fields = {"arrival_ns": self.now_ns, "stop_token_ids": frozenset([EOS]), **fields}
        request = make_request(key, prompt, max_tokens, **fields)
        self.requests.append(request)
        self.scheduler.submit(request)
        return request

    def try_plan(self) -> StepPlan | None:
        """The next plan, if there is one."""
        self.now_ns += PLAN_NS
        plan = self.scheduler.plan(self.now_ns)
        if plan is not None:
            self._follow(plan)
            for row in {*plan.rows.tolist(), *plan.sampling_rows.tolist()}:
                assert self._tables[row] == self.scheduler.kv.table(row).tolist(), row
        self._check()
        return plan

    def plan(self) -> StepPlan:
        """The next plan; there must be one."""
        plan = self.try_plan()
        assert plan is not None
        return plan

    def commit(
        self,
        tokens: int | Sequence[int] = TOKEN,
        scores: Sequence[Scores] | None = None,
        failed_rows: Iterable[int] = (),
    ) -> StepOutput:
        """Answer the oldest plan in flight.

        Args:
            tokens: one for all samples, or one of each, in plan order.
            scores: candidates of each sample that asked for some, in plan order. Without them each
                has TOKEN and the ids after it, each less likely than the one before.
            failed_rows: whose logits were not finite.
        """
        plan = self.scheduler.in_flight[0]
        counts = plan.num_candidates
        asked = counts[counts > 0].tolist() if counts is not None else []
        if scores is None:
            scores = [{TOKEN + i: -1.0 - i for i in range(count)} for count in asked]
        assert len(scores) == len(asked), (scores, asked)
        pairs = [p for each, n in zip(scores, asked, strict=True) for p in _best(each, n)]
        result = StepTokens(
            plan.epoch,
            plan.step_id,
            np.broadcast_to(np.array(tokens, np.int32), len(plan.sampling_rows)).copy(),
            frozenset(failed_rows),
            np.array([token_id for token_id, _ in pairs], np.int32),
            np.array([logprob for _, logprob in pairs], np.float32),
            np.full(len(asked), -0.5, np.float32),
        )
        output = self.scheduler.commit(result)
        self._check()
        return output

    def step(self, tokens: int | Sequence[int] = TOKEN) -> StepPlan:
        """Plan and commit."""
        plan = self.plan()
        self.commit(tokens)
        return plan

    def begin_epoch(self, **limits: int) -> StepOutput:
        """Lose the executor; another one takes its place."""
        self.limits = dataclasses.replace(self.limits, **limits)
        self._tables = {}
        output = self.scheduler.begin_epoch(self.scheduler.epoch + 1, self.limits)
        self._check()
        return output

    def run_dry(self, max_steps: int = 1000) -> list[StepPlan]:
        """Step until nothing is left to do; returns the plans."""
        plans = []
        for _ in range(max_steps):
            plan = self.try_plan()
            if plan is not None:
                plans.append(plan)
            elif not self.scheduler.in_flight:
                kv = self.scheduler.kv
                assert not self._tables, "a row was never freed"
                assert (kv.pool.num_used, kv.host.num_used) == (0, 0)
                return plans
            self.commit()
        raise AssertionError("no end")

    def run(self, prompt: int | Sequence[int], max_tokens: int = 1, **fields: Any) -> Request:
        """One request from its submission to its end, alone."""
        request = self.submit(prompt, max_tokens, **fields)
        self.run_dry()
        return request

    # ---- checks

    def _follow(self, plan: StepPlan) -> None:
        """Apply a plan to the tables, in the order of the wire contract."""
        tables = self._tables
        for row in plan.freed_rows:
            del tables[row]
        forked = {dst: _forked(tables[src], tail) for src, dst, tail in plan.forks}
        tables.update(forked)
        for new in plan.new_rows:
            assert new.row not in tables, f"row {new.row} is live"
            tables[new.row] = new.block_ids.tolist()
        num_taken = 0
        block_ids = [i for ids in plan.append_block_ids for i in ids.tolist()]
        for row, count in zip(plan.append_rows, plan.append_counts, strict=True):
            tables[row] += block_ids[num_taken : num_taken + count]
            num_taken += count
        for pairs in (plan.moves.swap_out, plan.moves.copy, plan.moves.swap_in):
            assert len({dst for _, dst in pairs}) == len(pairs), f"destination twice: {pairs}"

    def _check(self) -> None:
        scheduler = self.scheduler
        scheduler.kv.check_conservation([b for r in self.requests for b in r.branches])
        accounting = scheduler.snapshot()
        for pool in (accounting.device, accounting.host):
            classes = dataclasses.asdict(pool)
            num_slots = classes.pop("num_slots")
            assert min(classes.values()) >= 0, classes
            classes.pop("num_saved_by_sharing", None)
            assert sum(classes.values()) == num_slots, classes


def _forked(table: list[int], tail_block_id: int) -> list[int]:
    return [*table[:-1], tail_block_id] if tail_block_id else table.copy()


def _best(scores: Scores, count: int) -> list[tuple[int, float]]:
    filled = {**{_FILLER + i: -60.0 - i for i in range(count)}, **scores}
    return sorted(filled.items(), key=lambda pair: -pair[1])[:count]


def output_ids(branch: Branch) -> list[int]:
    """Output tokens of a branch that does not run."""
    ids: list[int] = branch.token_ids[branch.request.num_prompt_tokens :].tolist()
    return ids


def new_row_of(plan: StepPlan, branch: Branch) -> NewRow:
    """The entry by which a plan begins this branch's row; there must be one."""
    (new,) = [new for new in plan.new_rows if new.branch is branch]
    return new


def admitted(plan: StepPlan) -> list[Request]:
    """Requests whose rows begin with this plan."""
    return [new.branch.request for new in plan.new_rows]


def go_on(driver: Driver) -> StepOutput:
    """Answer the oldest plan in flight so that each beam has one successor, and none forks."""
    counts = driver.scheduler.in_flight[0].num_candidates
    num_asking = 0 if counts is None else int((counts > 0).sum())
    return driver.commit(scores=[{60: -0.1}] * num_asking)


def num_preemptions(driver: Driver) -> int:
    """Of all requests, either way."""
    counters = driver.scheduler.snapshot().counters
    return counters.num_preemptions_by_recompute + counters.num_preemptions_by_swap


WIDTH_2: Final = BeamParams(2, num_returned=2)
PARTING: Final = [{50: -1.0, 51: -2.0}]
"""First candidates of a search: two beams that share no output."""

SWAP: Final = Policy(PreemptionMode.SWAP)
RECOMPUTE: Final = Policy(PreemptionMode.RECOMPUTE)

"""Random walks of scheduler and executor, checked token by token against a reference.

One walk is one seed: a random configuration, then random arrivals, aborts, early stops, delays,
losses and restarts, until every request has ended. The scheduler, the plan codec and the executor's
decode, plan_check and row_state are the real ones; the runner checks content (backends/checking).

    python -m integration_tests.random_walk --seeds 2000
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks import report
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from executor_svc.plan import PlanError
from integration_tests.sim_link import SimLink
from integration_tests.walk_books import check_books
from integration_tests.walk_config import (
    STEP_NS,
    random_limits,
    random_policy,
    random_prices,
    random_weather,
    resized,
)
from integration_tests.walk_isolation import Isolation, check_forgotten
from integration_tests.walk_log import MakeScheduler, run_recorded
from integration_tests.walk_request import RequestMaker, WalkRequest
from scheduler_svc import plan_codec
from scheduler_svc.request import RequestStatus
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepOutput

_MAX_RESTARTS: Final = 6
_ACTIONS_PER_STEP: Final = 20
_STEPS_PER_TOKEN: Final = 8
"""Plans that a token of a request may cost, waiting and computing again included."""


@dataclass(slots=True)
class WalkCounts:
    """What a walk came across."""

    requests: int = 0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    chunked_prefills: int = 0
    same_batches: int = 0
    late_tokens: int = 0  # sampled for a request that had left its row
    epochs: int = 0
    cuts: int = 0
    replayed_results: int = 0
    resent_plans: int = 0
    aborts: int = 0
    stop_tokens: int = 0
    stop_strings: int = 0
    failed_requests: int = 0
    samples: int = 0  # requests with several
    borrowed_logits: int = 0
    beam_searches: int = 0
    forks: int = 0
    copied_blocks: int = 0
    hit_tokens_device: int = 0
    hit_tokens_host: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    preemptions_by_swap: int = 0
    evictions: int = 0
    flushes: int = 0
    deadlines: int = 0
    expired: int = 0

    def add(self, other: WalkCounts) -> None:
        """Sum each count."""
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Walk:
    """One seed's walk."""

    def __init__(
        self, seed: int, *, checks_pool: bool = True, make_scheduler: MakeScheduler = Scheduler
    ) -> None:
        """Draw the configuration.

        Args:
            seed: of everything random.
            checks_pool: False leaves it to the outputs to show that the pool's books are wrong.
            make_scheduler: the scheduler, or one that writes a log.
        """
        self.counts = WalkCounts()
        self._rng = rng = random.Random(seed)
        self._checks_pool = checks_pool
        self._limits = random_limits(rng)
        self._window = rng.randint(1, 3)
        self._weather = random_weather(rng)
        self._num_arrivals_left = rng.randint(10, 40)
        self._arrival_weight = rng.choice([0.1, 1.0, 10.0])
        self._poisoned_seeds: set[int] = set()
        self._link = SimLink(self._runner())
        self._isolation = Isolation(self._limits)
        self._maker = RequestMaker(rng)
        self._scheduler = make_scheduler(self._limits, random_policy(rng))
        self._scheduler.set_cost_model(random_prices(rng))
        self._scheduler.begin_epoch(self._link.epoch, self._limits)
        self._requests: dict[int, WalkRequest] = {}
        self._num_max_steps = 100
        self._num_restarts_left = _MAX_RESTARTS
        self._has_nothing_to_plan = False  # until something else happens

    def run(self) -> WalkCounts:
        """Walk until every request has ended. Raises AssertionError or PlanError."""
        num_actions = 0
        while self._num_arrivals_left or self._is_busy:
            actions = self._actions()
            assert actions, f"nothing moves, but {self._live()} wait"
            (action,) = self._rng.choices(list(actions), list(actions.values()))
            action()
            num_actions += 1
            assert num_actions < _ACTIONS_PER_STEP * self._num_max_steps, "no step is ever ended"
            assert self.counts.steps < self._num_max_steps, f"{self._live()} starve"
        self._check_idle()
        self._add_counters()
        self.counts.resent_plans = self._link.num_resent
        self.counts.replayed_results = self._link.num_replayed
        return self.counts

    def _add_counters(self) -> None:
        counters, counts = self._scheduler.snapshot().counters, self.counts
        counts.preemptions_by_swap = counters.num_preemptions_by_swap
        counts.preemptions = (
            counters.num_preemptions_by_recompute + counters.num_preemptions_by_swap
        )
        counts.hit_tokens_device = counters.num_hit_tokens_device
        counts.hit_tokens_host = counters.num_hit_tokens_host
        counts.copied_blocks = counters.num_copied
        counts.swapped_out_blocks = counters.num_swapped_out
        counts.swapped_in_blocks = counters.num_swapped_in
        counts.evictions = counters.num_evicted

    @property
    def _is_busy(self) -> bool:
        return self._scheduler.has_work or self._link.num_sent > 0

    @property
    def _now_ns(self) -> int:
        return self.counts.steps * STEP_NS

    def _live(self) -> list[WalkRequest]:
        return [request for request in self._requests.values() if not request.is_ended]

    def _actions(self) -> dict[Callable[[], None], float]:
        """What can happen now, with weights; empty if nothing moves by itself any more."""
        link, weather, live = self._link, self._weather, self._live()
        has_room = link.num_sent < self._window
        possible = {
            self._plan: 4.0
            * (has_room and self._scheduler.has_work and not self._has_nothing_to_plan),
            self._deliver: 4.0 * link.has_plan_under_way,
            self._complete: 4.0 * bool(link.executor.num_in_flight),
            self._commit: 4.0 * link.has_result_under_way,
            self._arrive: self._arrival_weight * bool(self._num_arrivals_left),
            self._find_stop_string: 1.0 * any(request.wants_stop for request in live),
        }
        actions = {action: weight for action, weight in possible.items() if weight}
        if link.num_sent:
            actions[self._cut] = weather.cut
            actions[self._restart] = weather.restart * bool(self._num_restarts_left)
        if actions and live:
            actions[self._abort] = weather.abort
            actions[self._poison] = weather.poison
            actions[self._flush] = weather.flush
        return actions

    # ---- ordinary life

    def _arrive(self) -> None:
        self._num_arrivals_left -= 1
        self.counts.requests += 1
        request = self._maker.make(self.counts.requests, self._limits)
        self._weather.hurry.draw(request.request, self._now_ns)
        self.counts.deadlines += request.request.deadline_ns > 0
        self._requests[request.request.key] = request
        self.counts.samples += request.request.num_samples > 1
        self.counts.beam_searches += request.request.beam is not None
        self._num_max_steps += _num_steps(request) + 20
        self._scheduler.submit(request.request)
        self._has_nothing_to_plan = False

    def _plan(self) -> None:
        scheduler, counts = self._scheduler, self.counts
        oldest = min(scheduler.running.values(), key=lambda branch: branch.age, default=None)
        before = dict(scheduler.running)
        plan = scheduler.plan(now_ns=self._now_ns)
        self._end_expired()
        self._check_pool()
        if oldest is not None:
            assert oldest.status is RequestStatus.RUNNING, "the oldest was preempted"
        self._has_nothing_to_plan = plan is None
        if plan is None:
            return
        assert plan.num_tokens <= self._limits.max_num_batched_tokens
        has_preempted = any(b.status is RequestStatus.WAITING for b in before.values())
        new_keys = {new.branch.key for new in plan.new_rows if new.logits_from is None}
        admitted = new_keys - before.keys()
        assert not (has_preempted and admitted), "admitted in a step that preempted"
        self._isolation.follow(plan, scheduler.rows)
        counts.steps += 1
        counts.forks += len(plan.forks)
        counts.borrowed_logits += sum(new.logits_from is not None for new in plan.new_rows)
        counts.same_batches += plan.same_batch
        counts.chunked_prefills += len(plan.rows) > len(plan.sampling_rows)
        self._link.send(plan_codec.encode(plan))

    def _end_expired(self) -> None:
        for request in self._scheduler.take_expired():
            self._requests[request.key].expire()
            self.counts.expired += 1

    def _deliver(self) -> None:
        self._link.deliver()

    def _complete(self) -> None:
        self._link.complete()

    def _commit(self) -> None:
        result = self._link.take()
        if result is not None:
            output = self._scheduler.commit(plan_codec.decode(result))
            self.counts.late_tokens += len(result.token_ids) - len(output.token_ids)
            self._publish(output)
            self._check_pool()
            self._has_nothing_to_plan = False

    def _publish(self, output: StepOutput) -> None:
        columns = (output.frontends, output.request_ids, output.branches, output.token_ids)
        for entry, (frontend, key, branch, token_id) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            request = self._requests[key]
            assert frontend == request.request.frontend, request
            request.take_token(branch, token_id, output.logprobs.get(entry))
            self.counts.tokens += 1
        for finished in output.finished:
            self._requests[finished.request.key].end(finished, self._limits)
            self.counts.stop_tokens += finished.stop_token_id is not None
            if finished.status is RequestStatus.FINISHED_ERROR:
                self.counts.failed_requests += 1
                requests = [request.request for request in self._requests.values()]
                check_forgotten(self._scheduler.kv, finished.request, requests)

    def _find_stop_string(self) -> None:
        """The front end looks at the text later than the engine at the tokens."""
        request = self._rng.choice([r for r in self._live() if r.wants_stop])
        index = next(i for i, branch in enumerate(request.branches) if branch.wants_stop)
        branch = request.branches[index]
        finished = self._scheduler.stop(request.request.branches[index], len(branch.output))
        branch.is_ended = True
        request.is_ended = all(each.is_ended for each in request.branches)
        assert finished.is_last == request.is_ended
        self._after_change()
        self.counts.stop_strings += 1

    # ---- weather

    def _abort(self) -> None:
        request = self._rng.choice(self._live())
        request.is_ended = True
        self._scheduler.abort(request.request)
        self._after_change()
        self.counts.aborts += 1

    def _after_change(self) -> None:
        self._check_pool()
        self._has_nothing_to_plan = False

    def _flush(self) -> None:
        self._scheduler.flush_cache()
        self._check_pool()
        self.counts.flushes += 1

    def _poison(self) -> None:
        request = self._rng.choice(self._live())
        request.is_poisoned = True
        self._poisoned_seeds.add(request.request.sampling.seed)

    def _cut(self) -> None:
        self._link.cut(resends_all=self._rng.random() < 0.5)
        self.counts.cuts += 1

    def _restart(self) -> None:
        """Lose the executor; the next one may have another pool."""
        self._num_restarts_left -= 1
        for request in self._live():
            for branch in request.branches:
                branch.num_barren_epochs += 1
        if self._rng.random() < 0.3:
            self._limits = resized(self._rng, self._limits, self._live())
        self._link.replace_executor(self._runner())
        self._isolation = Isolation(self._limits)
        self._publish(self._scheduler.begin_epoch(self._link.epoch, self._limits))
        self._check_pool()
        self.counts.epochs += 1
        self._num_max_steps += sum(map(_num_steps, self._live()))
        self._has_nothing_to_plan = False

    # ---- checks and parts

    def _check_pool(self) -> None:
        if self._checks_pool:
            check_books(self._scheduler, [r.request for r in self._requests.values()])

    def _check_idle(self) -> None:
        pool, host = self._scheduler.kv.pool, self._scheduler.kv.host
        assert not self._live(), f"{self._live()} never ended"
        assert not self._scheduler.in_flight
        assert not self._checks_pool or pool.num_free == pool.num_usable
        assert not self._checks_pool or host.num_free == host.num_usable
        assert not self._link.executor.state.is_live.any(), "a row was never freed"
        self._check_pool()

    def _runner(self) -> FakeRunner:
        limits = self._limits
        info = fake_info(
            limits.num_device_blocks,
            limits.num_host_blocks,
            block_size=limits.block_size,
            max_rows=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            vocab_size=limits.vocab_size,
        )
        return FakeRunner(info, FakeOptions(nan_seeds=self._poisoned_seeds))


def walk(seed: int) -> WalkCounts:
    """Walk one seed; if it fails, the error says where its plan log is."""
    return run_recorded(lambda make_scheduler: Walk(seed, make_scheduler=make_scheduler).run())


def _num_steps(request: WalkRequest) -> int:
    """Steps that a request may cost, whatever happens."""
    return _STEPS_PER_TOKEN * request.request.max_total_tokens * len(request.request.branches)


def main(arguments: list[str]) -> int:
    """Walk many seeds; prints a summary and writes benchmarks/results/random_walk.json."""
    parser = argparse.ArgumentParser(prog="python -m integration_tests.random_walk")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    begin = time.monotonic()
    total = WalkCounts()
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        try:
            total.add(walk(seed))
        except (AssertionError, PlanError) as error:
            raise AssertionError(f"seed {seed} failed") from error
    results = {
        "seeds": flags.seeds,
        "seconds": round(time.monotonic() - begin, 1),
        **dataclasses.asdict(total),
    }
    report.print_table("Random walk", ("what", "count"), list(results.items()))
    report.write("random_walk", results, [])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

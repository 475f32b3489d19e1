"""An engine's part without an engine: random requests, planned, run and logged in one process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockyard.common.columns import pack_u32
from blockyard.engine.v1 import engine_pb2
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from integration_tests.fake_executor import SyncExecutor
from integration_tests.walk_log import describe
from scheduler_svc import plan_codec
from scheduler_svc.cost_model import CostModel
from scheduler_svc.engine.admission import build_request
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log import MAX_FILE_BYTES, PlanLog
from scheduler_svc.policy import Policy
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepOutput

LIMITS: Final = Limits(
    num_device_blocks=41,
    block_size=4,
    max_num_seqs=12,
    max_num_batched_tokens=40,
    max_model_len=80,
    vocab_size=500,
    watermark_blocks=1,
    num_host_blocks=12,
    block_bytes=32,
)
_WINDOW: Final = 2
_MAX_LIVE: Final = 16


@dataclass(slots=True)
class SessionCounts:
    """What happened in a session, so that a test can ask that it did."""

    aborts: int = 0
    stops: int = 0
    epochs: int = 0
    failed_rows: int = 0
    flushes: int = 0


class RecordedSession:
    """A session whose pool is short of blocks; all of it follows from the seed."""

    def __init__(self, path: Path, seed: int, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Begin a log at `path`, and the first epoch."""
        self.counts = SessionCounts()
        self.scheduler = Scheduler(LIMITS, Policy())
        self.num_plans = 0
        self._log = PlanLog(path, Policy(), max_file_bytes)
        self._rng = random.Random(seed)
        self._live: dict[int, Request] = {}  # by key
        self._num_outputs: dict[tuple[int, int], int] = {}  # by key and branch
        self._nan_seeds: set[int] = set()
        self._num_submits = 0
        self._now_ns = 0
        self._documents = [self._tokens(60) for _ in range(3)]
        self._begin_epoch()

    def record(self, num_plans: int) -> None:
        """Go on until so many plans are made, and then until every request has ended."""
        while self.num_plans < num_plans or self._live or self._executor.num_in_flight:
            self._now_ns += self._rng.randrange(1_000_000)
            self._disturb()
            if self.num_plans < num_plans and len(self._live) < _MAX_LIVE:
                self._submit()
            if self._executor.num_in_flight == _WINDOW or not self._plan():
                self._commit()
        self._log.close()

    def _begin_epoch(self) -> None:
        info = fake_info(
            LIMITS.num_device_blocks,
            LIMITS.num_host_blocks,
            block_size=LIMITS.block_size,
            max_rows=LIMITS.max_num_seqs,
            max_model_len=LIMITS.max_model_len,
            max_num_batched_tokens=LIMITS.max_num_batched_tokens,
            vocab_size=LIMITS.vocab_size,
        )
        self._executor = SyncExecutor(FakeRunner(info, FakeOptions(nan_seeds=self._nan_seeds)))
        self._log.begin_epoch(self._executor.epoch, describe(LIMITS), LIMITS)
        self._publish(self.scheduler.begin_epoch(self._executor.epoch, LIMITS))
        self.counts.epochs += 1

    def _disturb(self) -> None:
        """Now and then, what an engine must bear."""
        rng, dice = self._rng, self._rng.random()
        if dice < 0.01 and self._live:
            request = self._live.pop(rng.choice(list(self._live)))
            self._log.abort(request.key)
            self.scheduler.abort(request)
            self.counts.aborts += 1
        elif dice < 0.02:
            self._stop()
        elif dice < 0.025:
            self._log.flush_cache()
            self.scheduler.flush_cache()
            self.counts.flushes += 1
        elif dice < 0.03:
            prices = pb.CostModel(
                step_ns=1e6, token_ns=1e4, swap_bytes_per_s=rng.choice([1e2, 1e8])
            )
            self._log.cost_model(prices)
            self.scheduler.set_cost_model(
                CostModel(prices.step_ns, prices.token_ns, 0.0, prices.swap_bytes_per_s)
            )
        elif dice < 0.031:
            self._begin_epoch()
        elif dice < 0.033 and self._live:
            self._nan_seeds.add(self._live[rng.choice(list(self._live))].sampling.seed)

    def _stop(self) -> None:
        """A front end has found a stop string in some branch."""
        running = [
            (request.branches[branch], count)
            for (key, branch), count in self._num_outputs.items()
            if (request := self._live.get(key)) is not None and request.beam is None
            if not request.branches[branch].status.is_finished
        ]
        if running:
            branch, count = self._rng.choice(running)
            self._log.stop(branch.request.key, branch.index, count)
            if self.scheduler.stop(branch, count).is_last:
                del self._live[branch.request.key]
            self.counts.stops += 1

    def _submit(self) -> None:
        self._num_submits += 1
        submit = self._random_submit()
        request = build_request(
            submit,
            LIMITS,
            key=self._num_submits,
            frontend=self._num_submits % 3,
            now_ns=self._now_ns,
            deadline_ns=self._deadline_ns(),
            text_stop=lambda _strings: lambda token_ids: int(token_ids[-1]) % 29 == 0,
        )
        self._live[request.key] = request
        self._log.submit(submit, request)
        self.scheduler.submit(request)

    def _deadline_ns(self) -> int:
        """Of the newest submit: one in three has one, which may be very near."""
        number = self._num_submits
        return 0 if number % 3 else self._now_ns + 1 + number % 7 * 20_000_000

    def _random_submit(self) -> engine_pb2.Submit:
        rng = self._rng
        known = rng.choice(self._documents)[: rng.choice([0, 0, 8, 17, 24])]
        submit = engine_pb2.Submit(
            request_id=self._num_submits,
            prompt_token_ids=pack_u32([*known, *self._tokens(rng.randint(1, 12))]),
            max_tokens=rng.randint(1, 40),
            seed=rng.getrandbits(64),
            num_logprobs=rng.choice([0, 0, 0, 1]),
            cache_off=rng.random() < 0.1,
            priority=self._num_submits % 5 // 4,
        )
        if rng.random() < 0.15:
            submit.beam.width = rng.randint(1, 3)
            submit.beam.length_penalty = 1.0
            submit.max_tokens = rng.randint(1, 12)
            if rng.random() < 0.3:
                submit.stop_strings.append("?")
            return submit
        submit.num_samples = rng.choice([1, 1, 1, 2, 4])
        if rng.random() < 0.5:
            submit.temperature, submit.top_k, submit.top_p = 0.7, 40, 0.9
        if rng.random() < 0.3:
            submit.stop_token_ids.extend(self._tokens(20))
        return submit

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(LIMITS.vocab_size) for _ in range(count)]

    def _plan(self) -> bool:
        if not self.scheduler.has_work:
            return False
        self._log.plan_call(self._now_ns)
        plan = self.scheduler.plan(self._now_ns)
        for request in self.scheduler.take_expired():
            del self._live[request.key]
        if plan is None:
            return False
        message = plan_codec.encode(plan)
        self._log.plan(message)
        self._executor.launch(message)
        self.num_plans += 1
        return True

    def _commit(self) -> None:
        if not self._executor.num_in_flight:
            return
        result = self._executor.complete()
        self.counts.failed_rows += len(result.failed_rows)
        self._log.result(result)
        self._publish(self.scheduler.commit(plan_codec.decode(result)))

    def _publish(self, output: StepOutput) -> None:
        for key, branch in zip(output.request_ids.tolist(), output.branches.tolist(), strict=True):
            self._num_outputs[key, branch] = self._num_outputs.get((key, branch), 0) + 1
        for finished in output.finished:
            if finished.is_last:
                self._live.pop(finished.request.key, None)
                for branch in range(len(finished.request.branches)):
                    self._num_outputs.pop((finished.request.key, branch), None)

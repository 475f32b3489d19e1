"""What the prefix cache costs where it finds nothing: `python -m benchmarks.cache_cost`.

The scheduler and its codec alone, with the cache and without, in interleaved pairs of runs; CPU
time. Two workloads: rows that only decode give the cost of a step, requests that come and go
(1,000 tokens each, all different, in a full pool) the cost of a request.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks import report
from scheduler_svc import plan_codec
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import StepTokens

_NUM_ROWS: Final = 64
_BLOCK_SIZE: Final = 16
_PROMPT_TOKENS: Final = 500
_REQUEST_TOKENS: Final = 1000
_VOCAB_SIZE: Final = 50_000
_MAX_STEP_US: Final = 20.0
_MAX_REQUEST_US: Final = 150.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run's totals."""

    cpu_s: float
    num_steps: int
    num_requests: int  # submitted
    num_evicted: int


class Workload:
    """A scheduler that is kept full of requests of `num_tokens` tokens, prompt included."""

    def __init__(self, *, is_caching: bool, num_tokens: int) -> None:
        """Size the pool so that all rows fit, with a quarter to spare."""
        num_blocks = 5 * _NUM_ROWS * (num_tokens // _BLOCK_SIZE + 1) // 4
        self._limits = Limits(
            num_device_blocks=num_blocks + 1,
            block_size=_BLOCK_SIZE,
            max_num_seqs=_NUM_ROWS,
            max_num_batched_tokens=4096,
            max_model_len=num_tokens + 1,
            vocab_size=_VOCAB_SIZE,
        )
        self._num_tokens = num_tokens
        self._scheduler = Scheduler(self._limits, Policy(is_caching=is_caching))
        self._scheduler.begin_epoch(1, self._limits)
        self._random = np.random.default_rng(0)
        self._num_requests = 0

    def run(self, num_steps: int) -> Run:
        """CPU time of `num_steps` steps, results included, after the rows are full."""
        while len(self._scheduler.running) < _NUM_ROWS:
            self._step()
        num_requests = self._num_requests
        start_s = time.process_time()
        for _ in range(num_steps):
            self._step()
        cpu_s = time.process_time() - start_s
        num_evicted = self._scheduler.snapshot().counters.num_evicted
        return Run(cpu_s, num_steps, self._num_requests - num_requests, num_evicted)

    def _step(self) -> None:
        scheduler = self._scheduler
        if len(scheduler.running) + len(scheduler.waiting) < _NUM_ROWS:
            self._submit()
        plan = scheduler.plan(0)
        assert plan is not None
        plan_codec.encode(plan)
        token_ids = self._random.integers(0, _VOCAB_SIZE, len(plan.sampling_rows), np.int32)
        scheduler.commit(StepTokens(1, plan.step_id, token_ids))

    def _submit(self) -> None:
        self._num_requests += 1
        # The first ones end at different times, as they would after a while.
        stagger = self._num_requests * 7 % _PROMPT_TOKENS if self._num_requests <= _NUM_ROWS else 0
        self._scheduler.submit(
            Request(
                key=self._num_requests,
                frontend=0,
                request_id=self._num_requests,
                prompt=self._random.integers(0, _VOCAB_SIZE, _PROMPT_TOKENS, np.int32),
                max_total_tokens=self._num_tokens - stagger,
                arrival_ns=0,
            )
        )


def measure(num_pairs: int, num_steps: int, num_tokens: int) -> list[tuple[Run, Run]]:
    """Pairs of runs (with the cache, without), the order within a pair alternating."""
    pairs = []
    for index in range(num_pairs):
        runs = {}
        for is_caching in (index % 2 == 0, index % 2 == 1):
            runs[is_caching] = Workload(is_caching=is_caching, num_tokens=num_tokens).run(num_steps)
        pairs.append((runs[True], runs[False]))
        print(f"pair {index + 1} of {num_pairs}, requests of {num_tokens} tokens", flush=True)
    return pairs


def _extra_us(pairs: list[tuple[Run, Run]], per: str) -> list[float]:
    """CPU time that the cache adds in each pair, per step or per request [us]."""
    return [(on.cpu_s - off.cpu_s) / getattr(on, per) * 1e6 for on, off in pairs]


def main(arguments: list[str]) -> int:
    """Measure, print, write benchmarks/results/cache_cost.json; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_cost")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100_000)
    flags = parser.parse_args(arguments)
    decoding = measure(flags.pairs, flags.steps, _PROMPT_TOKENS + flags.steps + 1000)
    churning = measure(flags.pairs, flags.steps, _REQUEST_TOKENS)
    step_us, request_us = _extra_us(decoding, "num_steps"), _extra_us(churning, "num_requests")
    results = {
        "pairs": flags.pairs,
        "steps": flags.steps,
        "rows": _NUM_ROWS,
        "requests_per_run": churning[0][0].num_requests,
        "evicted_blocks_per_run": churning[0][0].num_evicted,
        "step_us_without": statistics.median(
            off.cpu_s / off.num_steps * 1e6 for _, off in decoding
        ),
        "extra_us_per_step": step_us,
        "extra_us_per_request": request_us,
    }
    targets = [
        report.Target("extra CPU per step [us]", statistics.median(step_us), "<=", _MAX_STEP_US),
        report.Target(
            "extra CPU per request of 1,000 tokens [us]",
            statistics.median(request_us),
            "<=",
            _MAX_REQUEST_US,
        ),
    ]
    rows = [(key, value) for key, value in results.items() if not isinstance(value, list)]
    report.print_table("Prefix cache without hits", ("what", "value"), rows)
    is_met = report.print_targets(targets)
    report.write("cache_cost", results, targets)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a random walk draws: pools, policy and weather; and the pool that follows a loss."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Final

from integration_tests.walk_request import WalkRequest
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Request

VOCAB_SIZE: Final = 997
STEP_NS: Final = 1_000_000
"""What the walk's clock advances by with each step."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """How urgent requests are in one walk. Draws from numbers of its own."""

    rng: random.Random
    has_deadlines: float  # share of the requests
    patience_steps: float  # mean
    has_class: float  # share of the requests that are not of class 0

    def draw(self, request: Request, now_ns: int) -> None:
        """Give a request that arrives now its class and its deadline, if it is to have one."""
        rng, request.arrival_ns = self.rng, now_ns
        if rng.random() < self.has_class:
            request.priority = rng.randint(-1, 1)
        if rng.random() < self.has_deadlines:
            patience_ns = rng.expovariate(1 / self.patience_steps) * STEP_NS
            request.deadline_ns = now_ns + 1 + int(patience_ns)


@dataclass(frozen=True, slots=True)
class Weather:
    """How often things go wrong in one walk: weights beside those of ordinary actions."""

    cut: float
    restart: float
    abort: float
    poison: float
    flush: float
    hurry: Hurry


def random_limits(rng: random.Random) -> Limits:
    """Pools that hold between one and ten of the longest requests."""
    max_num_seqs = rng.randint(1, 8)
    num_blocks, block_size = rng.randint(4, 40), rng.choice([1, 2, 3, 4, 8])
    longest = int(num_blocks * block_size * rng.choice([0.15, 0.4, 0.7, 1.0]))
    return Limits(
        num_device_blocks=1 + num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 20, 60]),
        max_model_len=min(max(longest, 4), 100),
        vocab_size=VOCAB_SIZE,
        watermark_blocks=rng.randint(0, 2),
        num_host_blocks=rng.choice([0, 2, 10, 40]),
        block_bytes=8 * block_size,
    )


def random_policy(rng: random.Random) -> Policy:
    """Any way to preempt; mostly with a prefix cache."""
    return Policy(
        preemption=rng.choice(list(PreemptionMode)),
        is_caching=rng.random() < 0.9,
    )


def random_prices(rng: random.Random) -> CostModel:
    """Swapping is dear, cheap or has no price; reading KV is dear, cheap or free."""
    return CostModel(
        step_ns=STEP_NS,
        token_ns=1e4,
        kv_bytes_per_s=rng.choice([0.0, 1e4, 1e8]),
        swap_bytes_per_s=rng.choice([0.0, 1e2, 1e8]),
        pair_ns=rng.choice([0.0, 10.0, 1e3]),
    )


def random_weather(rng: random.Random) -> Weather:
    """Each kind of trouble never, now and then, or often."""

    def often(weight: float) -> float:
        return rng.choice([0.0, 0.0, weight / 10, weight])

    return Weather(
        cut=often(0.5),
        restart=often(0.05),
        abort=often(0.1),
        poison=often(0.05),
        flush=often(0.05),
        hurry=random_hurry(random.Random(hash(rng.getstate()[1]))),
    )


def random_hurry(rng: random.Random) -> Hurry:
    """Half of the walks know neither deadlines nor classes."""
    return Hurry(
        rng,
        has_deadlines=rng.choice([0.0, 0.0, 0.3, 1.0]),
        patience_steps=rng.choice([10.0, 30.0, 300.0]),
        has_class=rng.choice([0.0, 0.0, 0.5]),
    )


def resized(rng: random.Random, limits: Limits, live: list[WalkRequest]) -> Limits:
    """Another pool; mostly one that still holds every request."""
    fewest = 2
    for request in (each.request for each in live):
        needed = limits.blocks_for(request.max_total_tokens)
        if request.beam is not None:
            sizes = (request.num_prompt_tokens, request.max_total_tokens, request.width)
            needed = limits.beam_blocks(*sizes)
        fewest = max(fewest, needed + 1)
    num_blocks = rng.randint(fewest, fewest + 10) if rng.random() < 0.8 else max(2, fewest // 2)
    return dataclasses.replace(limits, num_device_blocks=num_blocks)

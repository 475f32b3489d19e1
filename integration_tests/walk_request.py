"""The random walk's requests: what is asked, what must come of it, what came."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from integration_tests.reference import SamplingParams, reference_output
from scheduler_svc.request import Request, RequestStatus, Sampling
from scheduler_svc.scheduler import MAX_SUSPICIONS, Limits
from scheduler_svc.step_plan import Finished

NUM_FRONTENDS: Final = 3


class OutputMismatchError(AssertionError):
    """A request got another token than the reference says."""


@dataclass(slots=True)
class WalkRequest:
    """One request of the walk and the output it got so far."""

    request: Request
    expected: list[int]  # the whole output, if nothing ends it early
    stops_at: int | None  # a stop string is found in this many output tokens
    output: list[int] = field(default_factory=list)
    is_ended: bool = False
    is_poisoned: bool = False  # its logits are not finite from some moment on
    num_barren_epochs: int = 0  # ends of epochs since it got its last token

    @property
    def num_tokens(self) -> int:
        """Prompt, and output so far."""
        return self.request.num_prompt_tokens + len(self.output)

    @property
    def num_tokens_wanted(self) -> int:
        """Prompt, and the whole output."""
        return self.request.num_prompt_tokens + len(self.expected)

    @property
    def wants_stop(self) -> bool:
        """Whether the front end has found its stop string."""
        return not self.is_ended and self.stops_at is not None and len(self.output) >= self.stops_at

    def take_token(self, token_id: int) -> None:
        """Check one token as it comes."""
        position = len(self.output)
        assert not self.is_ended, f"{self}: a token after its end"
        assert position < len(self.expected), f"{self}: a token too many"
        if token_id != self.expected[position]:
            wanted = self.expected[position]
            raise OutputMismatchError(f"{self}: token {position} is {token_id}, not {wanted}")
        self.output.append(token_id)
        self.num_barren_epochs = 0

    def end(self, finished: Finished, limits: Limits) -> None:
        """Check why and when the engine ended it."""
        assert not self.is_ended, f"{self}: ended twice"
        self.is_ended = True
        assert finished.num_output_tokens == len(self.output), (self, finished)
        if self.request.status is RequestStatus.FINISHED_ERROR:
            is_suspect = self.num_barren_epochs >= MAX_SUSPICIONS
            is_too_long = self.num_tokens >= limits.max_total_tokens
            assert self.is_poisoned or is_suspect or is_too_long, (self, finished)
            return
        # A smaller executor took over: the length limit shrank with it.
        is_shortened = self.num_tokens == self.request.max_total_tokens < self.num_tokens_wanted
        is_whole = self.output == self.expected
        assert is_whole or is_shortened, f"{self}: ended after {len(self.output)} tokens"
        is_stop = finished.stop_token_id is not None
        assert is_stop == (self.request.status is RequestStatus.FINISHED_STOP), (self, finished)
        if is_stop:
            assert finished.stop_token_id == self.output[-1], (self, finished)

    def __repr__(self) -> str:
        return f"request {self.request.key} ({self.request.status.name})"


def random_request(rng: random.Random, key: int, limits: Limits) -> WalkRequest:
    """Draw a request that fits `limits`; one in five has stop tokens, as many a stop string."""
    longest = limits.max_total_tokens
    num_prompt_tokens = min(1 + int(rng.expovariate(6 / longest)), longest - 1)
    max_tokens = min(1 + int(rng.expovariate(1.5 / longest)), longest - num_prompt_tokens)
    prompt = [rng.randrange(limits.vocab_size) for _ in range(num_prompt_tokens)]
    sampling = _random_sampling(rng)
    params = SamplingParams(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed
    )
    expected = reference_output(prompt, max_tokens, limits.vocab_size, params)
    stop_token_ids: frozenset[int] = frozenset()
    if rng.random() < 0.2:
        stop_token_ids = frozenset([rng.choice(expected), rng.randrange(limits.vocab_size)])
        first = next(i for i, token_id in enumerate(expected) if token_id in stop_token_ids)
        expected = expected[: first + 1]
    request = Request(
        key=key,
        frontend=rng.randrange(NUM_FRONTENDS),
        request_id=key,
        token_ids=np.array(prompt, np.int32),
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=num_prompt_tokens + max_tokens,
        arrival_ns=key,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
    )
    stops_at = rng.randint(1, len(expected)) if rng.random() < 0.2 else None
    return WalkRequest(request, expected, stops_at)


def _random_sampling(rng: random.Random) -> Sampling:
    seed = rng.getrandbits(64)
    if rng.random() < 0.5:
        return Sampling(seed=seed)
    return Sampling(
        temperature=rng.choice([0.25, 0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 1, 40]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        seed=seed,
    )

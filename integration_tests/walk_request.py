"""The random walk's requests: what is asked, what must come of it, what came."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from integration_tests.reference import SamplingParams, reference_output
from integration_tests.reference_beam import reference_beams, token_logprobs
from scheduler_svc.beam import BeamParams, EarlyStopping, Hypothesis
from scheduler_svc.limits import Limits
from scheduler_svc.request import Request, RequestStatus, Sampling, TokenIds
from scheduler_svc.scheduler import MAX_SUSPICIONS
from scheduler_svc.step_plan import Finished, Logprobs

NUM_FRONTENDS: Final = 3


class OutputMismatchError(AssertionError):
    """A request got another token than the reference says."""


@dataclass(slots=True)
class WalkBranch:
    """One choice of a request, and the output it got so far."""

    expected: list[int]  # the whole output, if nothing ends it early
    score: float | None = None  # of a hypothesis
    stops_at: int | None = None  # a stop string is found in this many output tokens
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    is_ended: bool = False
    num_barren_epochs: int = 0  # ends of epochs since it got its last token

    @property
    def wants_stop(self) -> bool:
        """Whether the front end has found its stop string."""
        return not self.is_ended and self.stops_at is not None and len(self.output) >= self.stops_at


@dataclass(slots=True)
class WalkRequest:
    """One request of the walk."""

    request: Request
    branches: list[WalkBranch]  # by index; of a beam search, the hypotheses to be returned
    vocab_size: int
    max_total_tokens: int  # as asked for
    is_ended: bool = False
    is_poisoned: bool = False  # its logits are not finite from some moment on

    @property
    def is_shortened(self) -> bool:
        """A smaller executor took over: the length limit shrank with it."""
        return self.request.max_total_tokens < self.max_total_tokens

    @property
    def wants_stop(self) -> bool:
        """Whether the front end has found a stop string."""
        return not self.is_ended and any(branch.wants_stop for branch in self.branches)

    def take_token(self, index: int, token_id: int, logprobs: Logprobs | None) -> None:
        """Check one token as it comes."""
        branch = self.branches[index]
        position = len(branch.output)
        assert not self.is_ended, f"{self}: a token after its end"
        assert not branch.is_ended, f"{self}: a token after the end of branch {index}"
        is_free = self.request.beam is not None and self.is_shortened
        if not is_free:
            assert position < len(branch.expected), f"{self}: a token too many"
            if token_id != (wanted := branch.expected[position]):
                raise OutputMismatchError(
                    f"{self}: token {position} of branch {index} is {token_id}, not {wanted}"
                )
        branch.output.append(token_id)
        assert (logprobs is not None) == bool(self.request.sampling.num_logprobs), self
        if logprobs is not None:
            branch.logprobs.append(logprobs)
        branch.num_barren_epochs = 0

    def end(self, finished: Finished, limits: Limits) -> None:
        """Check why and when the engine ended a branch."""
        assert not self.is_ended, f"{self}: ended twice"
        branch = self.branches[finished.branch if self.request.beam is None else 0]
        if finished.status is RequestStatus.FINISHED_ERROR:
            self._end_with_error(limits)
            return
        branch = self.branches[finished.branch]
        assert not branch.is_ended, f"{self}: branch {finished.branch} ended twice"
        branch.is_ended = True
        assert finished.num_output_tokens == len(branch.output), (self, finished)
        if self.request.beam is not None:
            self._check_score(branch, finished)
        num_tokens = self.request.num_prompt_tokens + len(branch.output)
        is_cut = self.is_shortened and num_tokens >= self.request.max_total_tokens
        is_free = self.request.beam is not None and self.is_shortened
        is_whole = branch.output == branch.expected
        assert is_whole or is_cut or is_free, f"{self}: ended after {len(branch.output)} tokens"
        if finished.stop_token_id is not None:
            assert finished.status is RequestStatus.FINISHED_STOP, (self, finished)
            assert finished.stop_token_id == branch.output[-1], (self, finished)
        self._check_logprobs(branch)
        self.is_ended = all(each.is_ended for each in self.branches)
        assert finished.is_last == self.is_ended, (self, finished)

    def expire(self) -> None:
        """Check that the engine may drop the request: it has not run, and has a deadline."""
        request = self.request
        assert not self.is_ended, f"{self}: dropped after its end"
        assert request.deadline_ns, f"{self}: dropped without a deadline"
        assert not request.place, f"{self}: it ran"
        self.is_ended = True

    def _end_with_error(self, limits: Limits) -> None:
        self.is_ended = True
        request = self.request
        longest = limits.max_total_tokens
        if request.beam is not None:
            longest = limits.max_beam_tokens(request.num_prompt_tokens, request.width)
        num_output_tokens = max(len(branch.output) for branch in self.branches)
        is_too_large = (
            request.num_prompt_tokens + num_output_tokens >= longest
            or request.width > limits.max_num_seqs
            or request.beam is not None  # its beams may be longer than what was streamed
        )
        is_suspect = any(b.num_barren_epochs >= MAX_SUSPICIONS for b in self.branches)
        assert self.is_poisoned or is_suspect or is_too_large, self

    def _check_score(self, branch: WalkBranch, finished: Finished) -> None:
        """The score is that of the tokens returned, whatever beams came to it."""
        beam = self.request.beam
        assert beam is not None
        total = sum(token_logprobs(self.request.prompt.tolist(), branch.output, self.vocab_size))
        score = total / len(branch.output) ** beam.length_penalty
        assert np.isclose(finished.score, score, rtol=1e-4, atol=1e-4), (self, finished, score)
        if not self.is_shortened and branch.score is not None:
            assert np.isclose(finished.score, branch.score), (self, finished, branch.score)

    def _check_logprobs(self, branch: WalkBranch) -> None:
        num_logprobs = self.request.sampling.num_logprobs
        if not num_logprobs:
            return
        wanted = token_logprobs(self.request.prompt.tolist(), branch.output, self.vocab_size)
        got = [each.logprob for each in branch.logprobs]
        if not np.allclose(got, wanted):
            raise OutputMismatchError(f"{self}: log-probabilities {got}, not {wanted}")
        if self.request.beam is None:
            counts = {len(each.candidate_token_ids) for each in branch.logprobs}
            assert counts == {num_logprobs - 1}, (self, counts)

    def __repr__(self) -> str:
        statuses = [branch.status.name for branch in self.request.branches]
        return f"request {self.request.key} {statuses}"


@dataclass(slots=True)
class RequestMaker:
    """Draws requests; many begin alike, and some go on where an earlier one ended."""

    rng: random.Random
    num_documents: int = 3
    _sequences: list[list[int]] = field(default_factory=list)

    def make(self, key: int, limits: Limits) -> WalkRequest:
        """Draw a request that fits `limits`."""
        rng, beam = self.rng, None
        if limits.max_num_seqs > 1 and rng.random() < 0.25:
            beam = _random_beam(rng, limits)
        prompt, max_tokens = self._lengths(limits, beam)
        sampling = _random_sampling(rng, is_beam=beam is not None)
        request = Request(
            key=key,
            frontend=rng.randrange(NUM_FRONTENDS),
            request_id=key,
            prompt=np.array(prompt, np.int32),
            max_total_tokens=len(prompt) + max_tokens,
            arrival_ns=key,
            sampling=sampling,
            stop_token_ids=frozenset(),
            is_text_stopped=None,
            num_samples=rng.choice([1, 1, 2, 3, 5]) if beam is None else 1,
            beam=beam,
            cache_salt=rng.choice([b"", b"", b"", b"other"]),
            is_cache_private=rng.random() < 0.1,
        )
        if beam is not None:
            branches = _beam_branches(rng, request, max_tokens, limits.vocab_size)
        else:
            branches = _sample_branches(rng, request, max_tokens, limits.vocab_size)
        self._sequences.append(prompt + branches[0].expected)
        return WalkRequest(request, branches, limits.vocab_size, request.max_total_tokens)

    def _lengths(self, limits: Limits, beam: BeamParams | None) -> tuple[list[int], int]:
        """A prompt, and how many tokens may follow it."""
        rng, longest = self.rng, limits.max_total_tokens
        num_tokens = min(1 + int(rng.expovariate(6 / longest)), longest - 1)
        prompt = [rng.randrange(limits.vocab_size) for _ in range(num_tokens)]
        if self._sequences and rng.random() < 0.6:
            known = rng.choice(self._sequences[: self.num_documents] + self._sequences[-3:])
            prompt = (known[: rng.randint(1, len(known))] + prompt)[: longest - 1]
            prompt = prompt[: rng.choice([len(prompt), max(1, len(prompt) - 1), 10**6])]
        if beam is not None:
            longest = limits.max_beam_tokens(len(prompt), beam.width)
            while longest <= len(prompt):
                prompt = prompt[: len(prompt) // 2]
                longest = limits.max_beam_tokens(len(prompt), beam.width)
        return prompt, min(1 + int(rng.expovariate(1.5 / longest)), longest - len(prompt))


def _random_beam(rng: random.Random, limits: Limits) -> BeamParams | None:
    width = rng.randint(1, min(8, limits.max_num_seqs, limits.num_usable_blocks))
    return BeamParams(
        width,
        rng.randint(1, width),
        rng.choice([0.0, 0.625, 1.0, 2.0, -1.0]),
        rng.choice(list(EarlyStopping)),
    )


def _beam_branches(
    rng: random.Random, request: Request, max_tokens: int, vocab_size: int
) -> list[WalkBranch]:
    beam = request.beam
    assert beam is not None
    prompt = request.prompt.tolist()
    is_text_stopped: Callable[[TokenIds], bool] | None = None
    if rng.random() < 0.2:
        divisor = rng.choice([7, 31])
        is_text_stopped = lambda ids: int(ids[-1]) % divisor == 0  # noqa: E731
    stop_token_ids: frozenset[int] = frozenset()
    results = reference_beams(prompt, max_tokens, vocab_size, beam, stop_token_ids, is_text_stopped)
    if rng.random() < 0.5:
        stop_token_ids = frozenset([int(rng.choice(results[0].token_ids.tolist()))])
        results = reference_beams(
            prompt, max_tokens, vocab_size, beam, stop_token_ids, is_text_stopped
        )
    request.stop_token_ids = stop_token_ids
    request.is_text_stopped = is_text_stopped
    return [_hypothesis(result) for result in results]


def _hypothesis(result: Hypothesis) -> WalkBranch:
    return WalkBranch(result.token_ids.tolist(), result.score)


def _sample_branches(
    rng: random.Random, request: Request, max_tokens: int, vocab_size: int
) -> list[WalkBranch]:
    """One in five requests has stop tokens, one in five branches a stop string."""
    sampling, prompt = request.sampling, request.prompt.tolist()
    outputs = []
    for index in range(request.num_samples):
        params = SamplingParams(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.seed,
            index,
        )
        outputs.append(reference_output(prompt, max_tokens, vocab_size, params))
    if rng.random() < 0.2:
        stops = frozenset([rng.choice(outputs[0]), rng.randrange(vocab_size)])
        request.stop_token_ids = stops
        outputs = [_until(output, stops) for output in outputs]
    return [
        WalkBranch(output, stops_at=rng.randint(1, len(output)) if rng.random() < 0.2 else None)
        for output in outputs
    ]


def _until(output: list[int], stop_token_ids: frozenset[int]) -> list[int]:
    for index, token_id in enumerate(output):
        if token_id in stop_token_ids:
            return output[: index + 1]
    return output


def _random_sampling(rng: random.Random, *, is_beam: bool) -> Sampling:
    seed = rng.getrandbits(64)
    if is_beam:
        return Sampling(seed=seed, num_logprobs=rng.choice([0, 0, 1]))
    num_logprobs = rng.choice([0, 0, 0, 0, 1, 4])
    if rng.random() < 0.5:
        return Sampling(seed=seed, num_logprobs=num_logprobs)
    return Sampling(
        temperature=rng.choice([0.25, 0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 1, 40]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        seed=seed,
        num_logprobs=num_logprobs,
    )

"""A plain beam search over every token of every beam, on a toy model; what test_beam drives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from scheduler_svc.beam import BeamParams, BeamSearch, EarlyStopping, FloatArray, TokenIds

Sequence = tuple[int, ...]
Stops = Callable[[Sequence], bool]
PROMPT = 3
"""Tokens of every prompt here."""


@dataclass(frozen=True)
class Toy:
    """A model whose next token depends on the last one and the length, so that paths part."""

    logprobs: FloatArray  # [num_tables, vocab_size + 1, vocab_size]; the last row is the prompt's

    @classmethod
    def random(cls, seed: int, vocab_size: int, likely: frozenset[int] = frozenset()) -> Toy:
        """`likely` tokens are more probable than the others."""
        logits = np.random.default_rng(seed).normal(0, 2, (3, vocab_size + 1, vocab_size))
        logits[:, :, sorted(likely)] += 1.5
        total = np.log(np.exp(logits).sum(-1, keepdims=True))
        return cls((logits - total).astype(np.float32))

    def next(self, output: Sequence) -> FloatArray:
        """Log-probabilities [vocab_size] of the token after these."""
        last = output[-1] if output else -1
        row: FloatArray = self.logprobs[len(output) % len(self.logprobs), last]
        return row


@dataclass
class Oracle:
    """Beam search from its definition: Python lists, all continuations sorted, nothing pruned."""

    toy: Toy
    params: BeamParams
    max_output: int
    stops: Stops
    num_stop_tokens: int
    running: list[tuple[np.float32, Sequence]] = field(
        default_factory=lambda: [(np.float32(0), ())]
    )
    finished: list[tuple[float, Sequence]] = field(default_factory=list)
    is_done: bool = False

    def step(self) -> None:
        width = self.params.width
        everything = [
            (np.float32(total + logprob), (*output, token))
            for total, output in self.running
            for token, logprob in enumerate(self.toy.next(output))
        ]
        everything.sort(key=lambda entry: -entry[0])
        top = everything[: max(2, 1 + self.num_stop_tokens) * width]
        length = len(top[0][1])
        ends = [length == self.max_output or self.stops(output) for _, output in top]
        for (total, output), has_ended in list(zip(top, ends, strict=True))[:width]:
            if has_ended:
                self.finished.append((self.score(total, length), output))
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:width]
        alive = [entry for entry, has_ended in zip(top, ends, strict=True) if not has_ended]
        self.running = alive[:width]
        self.is_done = not self.running or not self.can_improve(length)

    def can_improve(self, length: int) -> bool:
        if len(self.finished) < self.params.width:
            return True
        best = self.running[0][0]
        worst = self.finished[-1][0]
        match self.params.early_stopping:
            case EarlyStopping.AT_WIDTH:
                return False
            case EarlyStopping.NEVER if self.params.length_penalty > 0:
                return self.score(best, self.max_output) > worst
            case _:
                return self.score(best, length) > worst

    def score(self, total: np.float32, length: int) -> float:
        return float(total / np.float32(length**self.params.length_penalty))


@dataclass
class Case:
    """One search, ready to be driven."""

    toy: Toy
    params: BeamParams
    max_output: int
    stop_ids: frozenset[int] = frozenset()
    stop_modulus: int | None = None  # two tokens whose sum it divides are a "stop string"

    def stops(self, output: Sequence) -> bool:
        return output[-1] in self.stop_ids or self.completes_string(output)

    def completes_string(self, output: Sequence) -> bool:
        if self.stop_modulus is None or len(output) < 2:
            return False
        return (output[-1] + output[-2]) % self.stop_modulus == 0

    @property
    def oracle(self) -> Oracle:
        return Oracle(self.toy, self.params, self.max_output, self.stops, len(self.stop_ids))

    @property
    def search(self) -> BeamSearch:
        def is_stopped(token_ids: TokenIds) -> bool:
            return self.completes_string(tuple(token_ids.tolist()))

        return BeamSearch(
            self.params,
            PROMPT,
            PROMPT + self.max_output,
            self.stop_ids,
            None if self.stop_modulus is None else is_stopped,
        )

    def advance(self, search: BeamSearch, num_candidates: int | None = None) -> list[int]:
        """One step with as many candidates as the search says it needs."""
        if num_candidates is None:
            num_candidates = self.params.num_candidates(
                len(self.stop_ids), has_stop_strings=self.stop_modulus is not None
            )
        token_ids, logprobs = [], []
        for beam in range(search.num_beams):
            row = self.toy.next(tuple(search.output_ids(beam).tolist()))
            best = np.argsort(-row, kind="stable")[:num_candidates]
            token_ids.append(best.astype(np.int32))
            logprobs.append(row[best])
        return search.advance(token_ids, logprobs)

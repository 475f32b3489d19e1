"""Seeded traces with the statistics of two public ones, for readers who lack the files.

What is matched: the distributions of prompt and output lengths, the rate and burstiness of
arrivals and, for "mooncake", how conversations continue each other. docs/simulation.md says how
closely.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.simulate.trace import NS_PER_S, TRACE_BLOCK_TOKENS, Prefixes, Trace

GENERATORS: Final = ("azure", "mooncake")

Knots = tuple[tuple[float, float], ...]
"""(cumulative probability, value), both ascending: an inverse distribution function."""

# azure_conv_2023 of AzurePublicDataset: 19,366 requests.
_AZURE_RATE: Final = 5.53  # requests/s
_AZURE_GAP_CV: Final = 1.09  # of the times between arrivals
_AZURE_PROMPT: Final[Knots] = (
    *((0.0, 2), (0.01, 29), (0.02, 91), (0.05, 181), (0.1, 207), (0.15, 372), (0.2, 387)),
    *((0.35, 414), (0.4, 703), (0.45, 984), (0.5, 1020), (0.6, 1071), (0.7, 1130), (0.8, 1315)),
    *((0.85, 1876), (0.9, 2734), (0.92, 4073), (0.95, 4083), (0.99, 4142), (0.995, 4831)),
    *((0.9995, 6300), (1.0, 14050)),
)
_AZURE_OUTPUT: Final[Knots] = (
    *((0.0, 7), (0.01, 16), (0.05, 41), (0.1, 54), (0.2, 77), (0.3, 91), (0.4, 103)),
    *((0.5, 129), (0.6, 177), (0.65, 217), (0.66, 237), (0.67, 371), (0.75, 395), (0.8, 400)),
    *((0.85, 411), (0.9, 424), (0.95, 451), (0.97, 509), (0.99, 601), (0.999, 954), (1.0, 1000)),
)

# The first 2,000 requests of Mooncake's conversation trace.
_MOONCAKE_START_RATE: Final = 2.15  # conversations that begin, 1/s: 72 % of the requests
_MOONCAKE_CLUMP_NS: Final = 3 * NS_PER_S  # arrivals are recorded once in so long
_CONTINUES: Final = 0.37  # share of requests after which their conversation goes on
_BRANCHES_OFF: Final = 0.15  # share of continuations that keep only part of the prompt before
_MOONCAKE_PROMPT: Final[Knots] = (  # of conversations that begin
    *((0.0, 891), (0.05, 899), (0.1, 919), (0.2, 1378), (0.3, 2885), (0.4, 5059), (0.5, 6703)),
    *((0.6, 9242), (0.7, 12846), (0.8, 17869), (0.9, 27809), (0.95, 43399), (0.99, 94943)),
    (1.0, 122889),
)
_MOONCAKE_OUTPUT: Final[Knots] = (
    *((0.0, 1), (0.01, 3), (0.05, 10), (0.1, 25), (0.2, 107), (0.3, 225), (0.4, 311), (0.5, 363)),
    *((0.6, 410), (0.7, 460), (0.8, 517), (0.9, 602), (0.95, 689), (0.99, 1060), (1.0, 2000)),
)
_MOONCAKE_ADDED: Final[Knots] = (  # to prompt and output before, by a continuation [tokens]
    *((0.0, 1), (0.25, 9), (0.5, 21), (0.75, 205), (0.9, 4149), (0.95, 8188), (0.99, 20737)),
    (1.0, 30000),
)
_MOONCAKE_PAUSE_S: Final[Knots] = (  # from one request of a conversation to the next
    *((0.0, 3), (0.05, 27), (0.25, 57), (0.5, 96), (0.75, 181), (0.95, 388), (1.0, 594)),
)
_MOONCAKE_LONGEST: Final = 123_200


def generate(kind: str, count: int, seed: int) -> Trace:
    """A trace of `count` requests; `kind` is one of GENERATORS."""
    assert count >= 1, count
    rng = np.random.default_rng(seed)
    return _azure(count, rng) if kind == "azure" else _mooncake(count, rng)


def _draw(knots: Knots, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw whole values [count], one from each of `count` equal slices of probability, shuffled.

    So even a short trace has the distribution's statistics.
    """
    probabilities, values = np.array(knots).T
    slices = (rng.permutation(count) + rng.random(count)) / count
    drawn: npt.NDArray[np.float64] = np.interp(slices, probabilities, values)
    return np.rint(drawn).astype(np.int64)


def _azure(count: int, rng: np.random.Generator) -> Trace:
    shape = 1 / _AZURE_GAP_CV**2
    gaps_s = rng.gamma(shape, 1 / (shape * _AZURE_RATE), count)
    gaps_s[0] = 0
    return Trace(
        "azure-like",
        np.rint(np.cumsum(gaps_s) * NS_PER_S).astype(np.int64),
        _draw(_AZURE_PROMPT, count, rng).astype(np.int32),
        _draw(_AZURE_OUTPUT, count, rng).astype(np.int32),
    )


# ---- conversations


@dataclass(slots=True)
class _Turn:
    """One request of a conversation."""

    block_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class _Conversations:
    """Makes turns: new conversations, and continuations of old ones."""

    rng: np.random.Generator
    # All prompts begin with the same block, 0.
    next_block_id: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def begin(self, num_prompt_tokens: int, num_output_tokens: int) -> _Turn:
        """The first turn of a conversation."""
        return self._turn([0], num_prompt_tokens, num_output_tokens)

    def go_on(self, turn: _Turn, num_added_tokens: int, num_output_tokens: int) -> _Turn:
        """The turn after `turn`, with its answer and more in the prompt.

        Its blocks continue those that were full. Some turns go back to an earlier point instead.
        """
        num_kept_tokens = turn.num_prompt_tokens
        if self.rng.random() < _BRANCHES_OFF:
            num_kept_tokens = int(self.rng.uniform(0.1, 1) * num_kept_tokens)
        kept = turn.block_ids[: max(1, num_kept_tokens // TRACE_BLOCK_TOKENS)]
        num_prompt_tokens = turn.num_prompt_tokens + turn.num_output_tokens + num_added_tokens
        return self._turn(kept, min(num_prompt_tokens, _MOONCAKE_LONGEST), num_output_tokens)

    def _turn(self, kept: list[int], num_prompt_tokens: int, num_output_tokens: int) -> _Turn:
        num_blocks = -(-num_prompt_tokens // TRACE_BLOCK_TOKENS)
        new = itertools.islice(self.next_block_id, max(0, num_blocks - len(kept)))
        return _Turn([*kept[:num_blocks], *new], num_prompt_tokens, num_output_tokens)


def _mooncake(count: int, rng: np.random.Generator) -> Trace:
    outputs = _draw(_MOONCAKE_OUTPUT, count, rng).tolist()
    begun = iter(_draw(_MOONCAKE_PROMPT, count, rng).tolist())
    added = _draw(_MOONCAKE_ADDED, count, rng).tolist()
    pauses_ns = (_draw(_MOONCAKE_PAUSE_S, count, rng) * NS_PER_S).tolist()
    gaps_s = rng.exponential(1 / _MOONCAKE_START_RATE, count + 1)
    starts_ns = iter(np.rint(np.cumsum(gaps_s) * NS_PER_S).astype(np.int64).tolist())
    conversations = _Conversations(rng)
    waiting: list[tuple[int, int, _Turn]] = []  # time, tie-break, the turn to continue
    arrivals_ns, turns = [], []
    start_ns = next(starts_ns)
    for index in range(count):
        if waiting and waiting[0][0] <= start_ns:
            now_ns, _, before = heapq.heappop(waiting)
            turn = conversations.go_on(before, added[index], outputs[index])
        else:
            now_ns, start_ns = start_ns, next(starts_ns)
            turn = conversations.begin(next(begun), outputs[index])
        arrivals_ns.append(now_ns // _MOONCAKE_CLUMP_NS * _MOONCAKE_CLUMP_NS)
        turns.append(turn)
        if rng.random() < _CONTINUES:
            heapq.heappush(waiting, (now_ns + pauses_ns[index], index, turn))
    counts = [len(turn.block_ids) for turn in turns]
    ids = np.fromiter(itertools.chain.from_iterable(t.block_ids for t in turns), np.int64)
    return Trace(
        "mooncake-like",
        np.array(arrivals_ns, np.int64) - arrivals_ns[0],
        np.array([turn.num_prompt_tokens for turn in turns], np.int32),
        np.array([turn.num_output_tokens for turn in turns], np.int32),
        Prefixes(ids, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])),
    )

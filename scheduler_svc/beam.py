"""Beam search: which continuations live on, which end, and when the search is over.

Knows tokens and their log-probabilities, nothing of rows, blocks or text. It chooses as `generate`
of Hugging Face transformers 5.23 does with `num_beams`. Running scores are float32 sums, as there:
with any other precision the two would part at near ties. Equal scores go by the older hypothesis
first, then by beam, then by the order of its candidates; transformers leaves ties open.

The tokens of the live beams are a dense matrix. Beams descend from each other, so beyond a short
tail they agree; a step moves that tail alone.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

MAX_WIDTH: Final = 32
MAX_CANDIDATES: Final = 64
"""Most candidates of one row that an executor returns."""

_MAX_EXPONENT: Final = 70.0
"""Bounds the logarithm of what a score is divided by, so that no float32 score overflows."""


class EarlyStopping(enum.Enum):
    """When a search with `width` ended hypotheses is over."""

    HEURISTIC = "heuristic"  # no live beam, at its present length, beats the worst of them
    AT_WIDTH = "at_width"  # at once
    NEVER = "never"  # no live beam can beat the worst of them at any length


@dataclass(frozen=True, slots=True)
class BeamParams:
    """What a beam search was asked for."""

    width: int  # 1 to MAX_WIDTH
    num_returned: int = 1  # at most width
    length_penalty: float = 1.0  # score = log-probability / output tokens ** length_penalty
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC

    def __post_init__(self) -> None:
        assert 1 <= self.num_returned <= self.width <= MAX_WIDTH, self
        assert math.isfinite(self.length_penalty), self

    def num_joint_candidates(self, num_stop_tokens: int) -> int:
        """How many continuations of all beams together a step looks at."""
        return max(2, 1 + num_stop_tokens) * self.width

    def num_candidates(self, num_stop_tokens: int, *, has_stop_strings: bool = False) -> int:
        """How many of its likeliest tokens each row must yield for a choice among all to be exact.

        Without stop strings width + num_stop_tokens are enough. Only the joint best `width` may
        end, and a row has at most its own best `width` among them. The next beams are the joint
        best `width` that do not stop; a row has at most its own first `width` such tokens among
        them, and before the last of these come at most num_stop_tokens others.

        A stop string may be completed by any number of tokens; then only as many as the step looks
        at are surely enough.

        Never more than MAX_CANDIDATES. At the cap a choice can differ only if more than
        MAX_CANDIDATES - width of a row's candidates stop; it is then made among the others.
        """
        if has_stop_strings:
            return min(self.num_joint_candidates(num_stop_tokens), MAX_CANDIDATES)
        return min(self.width + num_stop_tokens, MAX_CANDIDATES)


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """An output of the search."""

    token_ids: TokenIds  # [n] output tokens, the stop token included
    logprobs: FloatArray  # [n] of each token
    score: float
    is_stopped: bool  # by a stop token or string, not by its length


class _Candidates(NamedTuple):
    """The best continuations of all beams, best first. Parallel [n]."""

    parents: list[int]
    token_ids: list[int]
    logprobs: FloatArray
    scores: FloatArray  # sums, no length penalty; never -inf


class BeamSearch:
    """The beams of one request; advanced by one token per beam and step."""

    def __init__(
        self,
        params: BeamParams,
        num_prompt_tokens: int,
        max_total_tokens: int,
        stop_token_ids: frozenset[int],
        is_stopped: Callable[[TokenIds], bool] | None = None,
    ) -> None:
        """`is_stopped` tells whether output tokens [n] complete a stop string with the last one.

        Such a token ends its hypothesis as a stop token does. The array is lent for the call.
        """
        assert max_total_tokens > num_prompt_tokens, (max_total_tokens, num_prompt_tokens)
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._max_output_tokens = max_total_tokens - num_prompt_tokens
        self._stop_token_ids = stop_token_ids
        self._is_stopped = is_stopped
        self._num_output_tokens = 0
        self._num_beams = 1
        # [width, max_output_tokens], filled up to [num_beams, num_output_tokens]. The column after
        # that is scratch: a candidate stands there beside its parent's tokens.
        self._token_ids: TokenIds = np.empty((params.width, self._max_output_tokens), np.int32)
        self._logprobs: FloatArray = np.empty(self._token_ids.shape, np.float32)
        self._scores: FloatArray = np.zeros(1, np.float32)  # [num_beams] sums; -inf: idle
        self._num_best = 1  # live beams among the joint best `width` of the last step
        self._num_shared = 0  # leading columns in which all beams agree; they never change again
        self._num_stable = 0
        self._hypotheses: list[Hypothesis] = []  # ended, best first; at most width

    @property
    def num_beams(self) -> int:
        """Live beams: 1 before the first advance, then the width; 0 when the search is over."""
        return self._num_beams

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of each live beam."""
        return self._num_output_tokens

    @property
    def is_done(self) -> bool:
        """Whether the search is over."""
        return self._num_beams == 0

    @property
    def last_token_ids(self) -> TokenIds:
        """The newest token of each live beam, the next inputs [num_beams]; after an advance."""
        return self._token_ids[: self._num_beams, self._num_output_tokens - 1].copy()

    def output_ids(self, beam: int) -> TokenIds:
        """Output tokens [num_output_tokens] of a live beam; 0 is the best."""
        assert 0 <= beam < self._num_beams, (beam, self._num_beams)
        return self._token_ids[beam, : self._num_output_tokens].copy()

    def parent_ids(self, beam: int) -> TokenIds:
        """Output tokens of a beam that was live before the advance that ended the search."""
        assert self.is_done, "the search goes on"
        return self._token_ids[beam, : max(0, self._num_output_tokens - 1)].copy()

    def advance(self, token_ids: Sequence[TokenIds], logprobs: Sequence[FloatArray]) -> list[int]:
        """Extend every live beam by one token, or end the search.

        Args:
            token_ids: of each live beam its likeliest next tokens, best first, equally many.
            logprobs: theirs under the model (full log-softmax); -inf: no such token.

        Returns the parent of each new live beam, best first; nothing if the search is over. If
        fewer than `width` continuations do not stop, the last beams are idle: copies that
        nothing comes of, so that the number of beams stays.
        """
        assert len(token_ids) == len(logprobs) == self._num_beams > 0
        candidates = self._best_candidates(token_ids, logprobs)
        live = self._end_stopped(candidates)
        self._num_output_tokens += 1
        if not live or self._is_over(candidates.scores[live[0]]):
            self._num_beams = 0
            return []
        return self._extend(candidates, live)

    def shorten(self, max_total_tokens: int) -> None:
        """Lower the length limit. Beams that have reached the new one end as they are."""
        assert max_total_tokens > self._num_prompt_tokens, max_total_tokens
        longest = max_total_tokens - self._num_prompt_tokens
        self._max_output_tokens = min(self._max_output_tokens, longest)
        if self.is_done:
            return
        if self._num_output_tokens >= self._max_output_tokens:
            for beam in range(self._num_best):
                self._end(beam, self._num_output_tokens, self._scores[beam], is_stopped=False)
            self._num_beams = 0
        elif self._is_over(self._scores[0]):
            self._num_beams = 0

    def results(self) -> list[Hypothesis]:
        """The best `num_returned` hypotheses, best first; once the search is over."""
        assert self.is_done, "the search goes on"
        return self._hypotheses[: self._params.num_returned]

    def stable_prefix(self) -> TokenIds:
        """Output tokens that whatever will be the best result begins with.

        They are what the live beams and the best hypothesis so far share. What it returned before
        is a prefix of what it returns later, and stays valid.
        """
        if self.is_done:
            return self._hypotheses[0].token_ids
        prefix = self._token_ids[0, : self._num_shared]
        # No beam goes on from where a hypothesis ended, so they differ before that.
        best = self._hypotheses[0].token_ids if self._hypotheses else prefix
        end = len(prefix)
        while self._num_stable < end and best[self._num_stable] == prefix[self._num_stable]:
            self._num_stable += 1
        stable = prefix[: self._num_stable]
        stable.flags.writeable = False
        return stable

    def stable_logprobs(self) -> FloatArray:
        """Log-probabilities of the tokens of the last `stable_prefix`, while the search goes on."""
        stable = self._logprobs[0, : self._num_stable]
        stable.flags.writeable = False
        return stable

    def _best_candidates(
        self, token_ids: Sequence[TokenIds], logprobs: Sequence[FloatArray]
    ) -> _Candidates:
        all_logprobs: FloatArray = np.concatenate(logprobs, dtype=np.float32)
        num_each = len(all_logprobs) // self._num_beams
        scores = (all_logprobs.reshape(-1, num_each) + self._scores[:, None]).ravel()
        num_wanted = self._params.num_joint_candidates(len(self._stop_token_ids))
        if len(scores) > num_wanted:
            # All that equal the last one wanted are kept, so that the sort decides between them.
            (found,) = (scores >= np.partition(scores, -num_wanted)[-num_wanted]).nonzero()
            found = found[(-scores[found]).argsort(kind="stable")[:num_wanted]]
        else:
            found = (-scores).argsort(kind="stable")
        scores = scores[found]
        num_possible = int(np.count_nonzero(scores > -np.inf))
        assert num_possible, "no beam has a candidate"
        found = found[:num_possible]
        return _Candidates(
            parents=(found // num_each).tolist(),
            token_ids=np.concatenate(token_ids)[found].tolist(),
            logprobs=all_logprobs[found],
            scores=scores[:num_possible],
        )

    def _end_stopped(self, candidates: _Candidates) -> list[int]:
        """End the best `width` candidates that stop; returns the ranks of the next live beams.

        At the longest length all stop.
        """
        width, column = self._params.width, self._num_output_tokens
        is_longest = column + 1 == self._max_output_tokens
        live: list[int] = []
        for rank, (parent, token_id) in enumerate(
            zip(candidates.parents, candidates.token_ids, strict=True)
        ):
            if rank >= width and (is_longest or len(live) == width):
                break
            self._token_ids[parent, column] = token_id
            is_stopped = token_id in self._stop_token_ids or (
                self._is_stopped is not None
                and self._is_stopped(self._token_ids[parent, : column + 1])
            )
            if not (is_stopped or is_longest):
                live.append(rank)
            elif rank < width:
                self._logprobs[parent, column] = candidates.logprobs[rank]
                self._end(parent, column + 1, candidates.scores[rank], is_stopped=is_stopped)
        return live

    def _end(self, beam: int, num_tokens: int, total: np.float32, *, is_stopped: bool) -> None:
        """Make a hypothesis of the beam's first tokens, if it is among the best `width`."""
        score = float(total / self._divisor(num_tokens))
        is_full = len(self._hypotheses) == self._params.width
        if is_full and score <= self._hypotheses[-1].score:
            return
        hypothesis = Hypothesis(
            token_ids=self._token_ids[beam, :num_tokens].copy(),
            logprobs=self._logprobs[beam, :num_tokens].copy(),
            score=score,
            is_stopped=is_stopped,
        )
        bisect.insort(self._hypotheses, hypothesis, key=lambda h: -h.score)
        del self._hypotheses[self._params.width :]

    def _extend(self, candidates: _Candidates, live: list[int]) -> list[int]:
        """Make the candidates of these ranks the live beams; returns their parents."""
        width, column = self._params.width, self._num_output_tokens - 1
        ranks = live + [0] * (width - len(live))
        parents = [candidates.parents[rank] for rank in ranks]
        if parents != list(range(width)):
            tail = slice(self._num_shared, column)
            self._token_ids[:, tail] = self._token_ids[parents, tail]
            self._logprobs[:, tail] = self._logprobs[parents, tail]
        self._token_ids[:, column] = [candidates.token_ids[rank] for rank in ranks]
        self._logprobs[:, column] = candidates.logprobs[ranks]
        self._scores = candidates.scores[ranks]
        self._scores[len(live) :] = -np.inf
        self._num_beams = width
        self._num_best = bisect.bisect_left(live, width)
        while self._num_shared < self._num_output_tokens:
            shared = self._token_ids[:, self._num_shared]
            if (shared != shared[0]).any():
                break
            self._num_shared += 1
        return parents

    def _is_over(self, best: np.float32) -> bool:
        """Whether no live beam may improve the hypotheses; `best` is the sum of the best one."""
        params = self._params
        if len(self._hypotheses) < params.width:
            return False
        if params.early_stopping is EarlyStopping.AT_WIDTH:
            return True
        is_better_longer = params.length_penalty > 0
        is_unlimited = params.early_stopping is EarlyStopping.NEVER and is_better_longer
        length = self._max_output_tokens if is_unlimited else self._num_output_tokens
        return bool(best / self._divisor(length) <= self._hypotheses[-1].score)

    def _divisor(self, num_tokens: int) -> np.float32:
        """num_tokens ** length_penalty."""
        exponent = self._params.length_penalty * math.log(num_tokens)
        return np.float32(math.exp(max(-_MAX_EXPONENT, min(_MAX_EXPONENT, exponent))))

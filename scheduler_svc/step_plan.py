"""What the scheduler decides for one step, and what a step's result makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler_svc.block_pool import BlockIds
from scheduler_svc.request import Branch, Request, RequestStatus, TokenIds

RowIds = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def _no_rows() -> RowIds:
    return np.empty(0, np.int64)


def _no_ids() -> TokenIds:
    return np.empty(0, np.int32)


def _no_floats() -> FloatArray:
    return np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class NewRow:
    """A branch that enters a row with this plan."""

    row: int
    branch: Branch
    num_computed_tokens: int
    token_ids: TokenIds  # [num_tokens - num_computed_tokens]
    block_ids: BlockIds  # the table so far: cached blocks, and those of the first chunk
    num_candidates: int = 0
    # Samples from this row's logits in this plan: see NewRows.logits_from.
    logits_from: int | None = None


@dataclass(slots=True)
class Moves:
    """Whole-block copies that a plan carries, as (source, destination)."""

    swap_out: list[tuple[int, int]] = field(default_factory=list)
    copy: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.swap_out or self.copy or self.swap_in)


@dataclass(slots=True)
class StepPlan:
    """One step. Appends and the batch are columns; see StepPlan in executor.proto."""

    epoch: int
    step_id: int
    moves: Moves = field(default_factory=Moves)
    freed_rows: list[int] = field(default_factory=list)
    forks: list[tuple[int, int, int]] = field(default_factory=list)  # source, row, tail block or 0
    new_rows: list[NewRow] = field(default_factory=list)
    append_rows: list[int] = field(default_factory=list)
    append_counts: list[int] = field(default_factory=list)
    append_block_ids: list[BlockIds] = field(default_factory=list)
    inputs: list[tuple[int, int]] = field(default_factory=list)  # row, token id
    rows: RowIds = field(default_factory=_no_rows)  # [num_rows]
    generations: npt.NDArray[np.int64] = field(default_factory=_no_rows)  # their residents
    num_scheduled_tokens: Sequence[int] = ()  # of the rows after the decode rows
    num_decode_rows: int = 0
    same_batch: bool = False
    # Which rows sample, which resident of the row it is for, and how many candidates it asked
    # for. [num_samples]
    sampling_rows: RowIds = field(default_factory=_no_rows)
    sampling_generations: npt.NDArray[np.int64] = field(default_factory=_no_rows)
    num_candidates: npt.NDArray[np.int32] | None = None  # None: nobody did

    @property
    def num_tokens(self) -> int:
        """Tokens scheduled."""
        return self.num_decode_rows + sum(self.num_scheduled_tokens)

    def samples(self, row: int, generation: int) -> bool:
        """Whether it yields a token for this resident of the row."""
        found = self.sampling_rows == row
        return bool((self.sampling_generations[found] == generation).any())

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all: then it is not sent."""
        return not (self.freed_rows or len(self.rows) or self.moves)

    @property
    def tokens_per_row(self) -> npt.NDArray[np.int64]:
        """Tokens scheduled for each of `rows` [num_rows]."""
        counts = np.ones(len(self.rows), np.int64)
        counts[self.num_decode_rows :] = self.num_scheduled_tokens
        return counts


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What one step's result means to the scheduler."""

    epoch: int
    step_id: int
    token_ids: TokenIds  # [num_samples], plan order
    failed_rows: frozenset[int] = frozenset()
    # Of the samples that asked for candidates, in plan order: their likeliest tokens, best first,
    # one sample after another, and the sampled token's own log-probability.
    candidate_token_ids: TokenIds = field(default_factory=_no_ids)
    candidate_logprobs: FloatArray = field(default_factory=_no_floats)
    token_logprobs: FloatArray = field(default_factory=_no_floats)


@dataclass(frozen=True, slots=True)
class Finished:
    """A branch that ended, with why; of a beam search, a hypothesis returned."""

    request: Request
    branch: int
    status: RequestStatus
    num_output_tokens: int
    is_last: bool = True  # the request is over
    stop_token_id: int | None = None
    error_message: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of one token, for those who asked."""

    logprob: float
    candidate_token_ids: TokenIds
    candidate_logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a commit yields for the front ends. Columns are parallel."""

    frontends: npt.NDArray[np.int32]  # [n]
    request_ids: npt.NDArray[np.uint64]  # [n]
    branches: npt.NDArray[np.int32]  # [n]
    token_ids: TokenIds  # [n], one per entry; a branch may have several, in order
    finished: Sequence[Finished] = ()
    logprobs: dict[int, Logprobs] = field(default_factory=dict)  # by index of the entry
    is_one_each: bool = True  # no branch has several entries


class TokenColumns:
    """Collects what becomes a StepOutput."""

    def __init__(self) -> None:
        self.finished: list[Finished] = []
        self.logprobs: dict[int, Logprobs] = {}
        self.num_tokens = 0
        self._is_one_each = True
        self._parts: tuple[list[npt.ArrayLike], ...] = ([], [], [], [])

    def add(
        self,
        frontends: npt.ArrayLike,
        request_ids: npt.ArrayLike,
        branches: npt.ArrayLike,
        token_ids: TokenIds,
    ) -> None:
        """Add one token for each of these branches; parallel [n]."""
        for parts, column in zip(
            self._parts, (frontends, request_ids, branches, token_ids), strict=True
        ):
            parts.append(column)
        self.num_tokens += len(token_ids)

    def add_branch(self, branch: Branch, token_ids: TokenIds) -> None:
        """Add tokens [n] of one branch."""
        request, count = branch.request, len(token_ids)
        self._is_one_each &= count == 1
        self.add(
            [request.frontend] * count,
            [request.request_id] * count,
            [branch.index] * count,
            token_ids,
        )

    def build(self) -> StepOutput:
        """The columns, concatenated in the order they were added."""

        def join(parts: list[npt.ArrayLike], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            if len(parts) == 1:
                return np.asarray(parts[0], dtype)
            return np.concatenate([np.asarray(p, dtype) for p in parts] or [np.empty(0, dtype)])

        frontends, request_ids, branches, token_ids = self._parts
        return StepOutput(
            join(frontends, np.int32),
            join(request_ids, np.uint64),
            join(branches, np.int32),
            join(token_ids, np.int32),
            self.finished,
            self.logprobs,
            self._is_one_each,
        )

"""What the scheduler decides for one step, and what a step's result makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler_svc.block_pool import BlockIds
from scheduler_svc.kv_manager import RowIds
from scheduler_svc.request import Request, TokenIds


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request that enters a row with this plan."""

    row: int
    request: Request
    num_computed_tokens: int
    token_ids: TokenIds  # [num_tokens - num_computed_tokens]
    block_ids: BlockIds  # [blocks of the first chunk]


@dataclass(slots=True)
class StepPlan:
    """One step. Appends and the batch are columns; see StepPlan in executor.proto."""

    epoch: int
    step_id: int
    freed_rows: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    append_rows: list[int] = field(default_factory=list)
    append_counts: list[int] = field(default_factory=list)
    append_block_ids: list[BlockIds] = field(default_factory=list)
    rows: RowIds = field(default_factory=lambda: np.empty(0, np.int64))  # [num_rows]
    num_scheduled_tokens: Sequence[int] = ()  # of the rows after the decode rows
    num_decode_rows: int = 0
    same_batch: bool = False
    # Which rows sample, and which resident of the row the token is for. [num_samples]
    sampling_rows: RowIds = field(default_factory=lambda: np.empty(0, np.int64))
    sampling_generations: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.empty(0, np.int64)
    )

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
        return not (self.freed_rows or len(self.rows))


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What one step's result means to the scheduler."""

    epoch: int
    step_id: int
    token_ids: TokenIds  # [num_samples], plan order
    failed_rows: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended, with why."""

    request: Request
    num_output_tokens: int
    stop_token_id: int | None = None
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a commit yields for the front ends. Columns are parallel."""

    frontends: npt.NDArray[np.int32]  # [n]
    request_ids: npt.NDArray[np.uint64]  # [n]
    token_ids: TokenIds  # [n], one per request
    finished: Sequence[Finished] = ()


class TokenColumns:
    """Collects what becomes a StepOutput."""

    def __init__(self) -> None:
        self.finished: list[Finished] = []
        self._frontends: list[npt.ArrayLike] = []
        self._request_ids: list[npt.ArrayLike] = []
        self._token_ids: list[npt.ArrayLike] = []

    def add(
        self, frontends: npt.ArrayLike, request_ids: npt.ArrayLike, token_ids: npt.ArrayLike
    ) -> None:
        """Add one token for each of these requests; parallel [n]."""
        self._frontends.append(frontends)
        self._request_ids.append(request_ids)
        self._token_ids.append(token_ids)

    def build(self) -> StepOutput:
        """The columns, concatenated in the order they were added."""

        def join(parts: list[npt.ArrayLike], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            if len(parts) == 1:
                return np.asarray(parts[0], dtype)
            return np.concatenate([np.asarray(p, dtype) for p in parts] or [np.empty(0, dtype)])

        return StepOutput(
            join(self._frontends, np.int32),
            join(self._request_ids, np.uint64),
            join(self._token_ids, np.int32),
            self.finished,
        )

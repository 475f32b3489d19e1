"""Building one step plan: the rows it runs and the blocks it appends, within the token budget."""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt

from scheduler_svc.block_pool import BlockIds
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import Moves, NewRow, RowIds, StepPlan


class BatchBuilder:
    """Collects what one call of Scheduler.plan decides."""

    def __init__(self, epoch: int, step_id: int, max_num_batched_tokens: int) -> None:
        """Start an empty plan with this token budget."""
        self.step_id = step_id
        self.budget = max_num_batched_tokens
        self._plan = StepPlan(epoch, step_id)
        self._decodes: RowIds = np.empty(0, np.int64)
        self._driven: list[int] = []
        self._prefills: list[int] = []
        self._chunks: list[int] = []
        self._samples: list[int] = []  # of _prefills

    def set_decodes(self, rows: RowIds) -> None:
        """Run one token of each of these rows [n]."""
        self._decodes = rows
        self._spend(len(rows))

    def add_driven(self, rows: list[int], token_ids: npt.NDArray[np.int32]) -> None:
        """Run one decided token of each of these rows; parallel [n]."""
        self._driven.extend(rows)
        self._plan.inputs.extend(zip(rows, token_ids.tolist(), strict=True))
        self._spend(len(rows))

    def _spend(self, num_tokens: int) -> None:
        self.budget -= num_tokens
        assert self.budget >= 0, "more decode rows than the token budget"

    def add_prefill(self, row: int, num_tokens: int, *, samples: bool) -> None:
        """Run `num_tokens` of this row; `samples` if they reach its last known token."""
        self._prefills.append(row)
        self._chunks.append(num_tokens)
        self.budget -= num_tokens
        if samples:
            self._samples.append(row)

    def add_row(self, new_row: NewRow) -> None:
        """Begin a row."""
        self._plan.new_rows.append(new_row)

    def add_fork(self, src: int, dst: int, tail_block_id: int) -> None:
        """Let row `dst` take over row `src`, with another last block unless that is 0."""
        self._plan.forks.append((src, dst, tail_block_id))

    def append_blocks(self, row: int, block_ids: BlockIds) -> None:
        """Append blocks to one existing row."""
        self._plan.append_rows.append(row)
        self._plan.append_counts.append(len(block_ids))
        self._plan.append_block_ids.append(block_ids)

    def append_one_each(self, rows: RowIds, block_ids: BlockIds) -> None:
        """Append one block to each of these existing rows [n]."""
        self._plan.append_rows.extend(rows.tolist())
        self._plan.append_counts.extend([1] * len(rows))
        self._plan.append_block_ids.append(block_ids)

    def scheduled_rows(self) -> set[int]:
        """Rows that are in the batch already, and so can no longer be preempted by this plan."""
        begun = (new.row for new in self._plan.new_rows)
        return set(chain(self._decodes.tolist(), self._driven, self._prefills, begun))

    def build(
        self, rows: Rows, freed_rows: list[int], moves: Moves, last_batch: RowIds
    ) -> StepPlan:
        """Finish the plan; `last_batch` is what the plan before it ran [n]."""
        plan = self._plan
        plan.freed_rows = freed_rows
        plan.moves = moves
        decodes = self._decodes
        if self._driven:
            decodes = np.append(decodes, self._driven).astype(np.int64)
        plan.rows = plan.sampling_rows = decodes
        if self._prefills:
            plan.rows = np.append(decodes, self._prefills).astype(np.int64)
            borrowers = [new.row for new in plan.new_rows if new.logits_from is not None]
            plan.sampling_rows = np.concatenate([decodes, self._samples, borrowers]).astype(
                np.int64
            )
        plan.num_decode_rows = len(decodes)
        plan.num_scheduled_tokens = self._chunks
        plan.generations = rows.generations[plan.rows]
        plan.sampling_generations = rows.generations[plan.sampling_rows]
        num_candidates = rows.num_candidates[plan.sampling_rows]
        if num_candidates.any():
            plan.num_candidates = num_candidates
        plan.same_batch = (
            len(decodes) > 0 and not self._prefills and np.array_equal(decodes, last_batch)
        )
        return plan

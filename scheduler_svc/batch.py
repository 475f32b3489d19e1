"""Building one step plan: the rows it runs and the blocks it appends, within the token budget."""

from __future__ import annotations

from itertools import chain

import numpy as np

from scheduler_svc.block_pool import BlockIds
from scheduler_svc.kv_manager import RowIds
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import NewRow, StepPlan


class BatchBuilder:
    """Collects what one call of Scheduler.plan decides."""

    def __init__(self, epoch: int, step_id: int, max_num_batched_tokens: int) -> None:
        """Start an empty plan with this token budget."""
        self.step_id = step_id
        self.budget = max_num_batched_tokens
        self._plan = StepPlan(epoch, step_id)
        self._decodes: RowIds = np.empty(0, np.int64)
        self._prefills: list[int] = []
        self._chunks: list[int] = []
        self._samples: list[int] = []  # of _prefills

    def set_decodes(self, rows: RowIds) -> None:
        """Run one token of each of these rows [n]."""
        self._decodes = rows
        self.budget -= len(rows)
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
        return set(chain(self._decodes.tolist(), self._prefills))

    def build(self, rows: Rows, freed_rows: list[int], last_batch: RowIds) -> StepPlan:
        """Finish the plan; `last_batch` is what the plan before it ran [n]."""
        plan = self._plan
        plan.freed_rows = freed_rows
        plan.rows = self._decodes
        plan.sampling_rows = self._decodes
        if self._prefills:
            plan.rows = np.append(self._decodes, self._prefills)
            plan.sampling_rows = np.append(self._decodes, self._samples).astype(np.int64)
        plan.num_decode_rows = len(self._decodes)
        plan.num_scheduled_tokens = self._chunks
        plan.sampling_generations = rows.generations[plan.sampling_rows]
        plan.same_batch = (
            len(self._decodes) > 0
            and not self._prefills
            and np.array_equal(self._decodes, last_batch)
        )
        return plan

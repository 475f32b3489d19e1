"""Columns over the executor's rows: the state of running branches, ready for vector operations."""

from __future__ import annotations

import numpy as np

from scheduler_svc.request import NO_ROW, Branch, TokenIds


class Rows:
    """One entry per executor row. A step touches only columns, never a branch per row.

    A running branch's tokens are positions of the sequence:
    [0, num_planned) are computed, or will be by plans already sent;
    [num_planned, num_tokens) are known and wait for prefill; empty once the row decodes, when
    num_planned may run ahead of num_tokens by the steps in flight.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        """Make room for `max_rows` rows of at most `max_tokens` tokens each."""
        self.tokens = np.zeros((max_rows, max_tokens), np.int32)  # touched pages only cost memory
        self.num_tokens = np.zeros(max_rows, np.int32)  # committed: prompt and output
        self.num_planned = np.zeros(max_rows, np.int32)
        self.max_total_tokens = np.zeros(max_rows, np.int32)
        self.frontends = np.zeros(max_rows, np.int32)
        self.request_ids = np.zeros(max_rows, np.uint64)
        self.branch_indexes = np.zeros(max_rows, np.int32)
        self.num_candidates = np.zeros(max_rows, np.int32)  # wanted with each result
        self.is_driven = np.zeros(max_rows, np.bool_)  # the scheduler decides its next inputs
        self.is_known = np.zeros(max_rows, np.bool_)  # the executor was told of it
        self.last_token_ns = np.zeros(max_rows, np.int64)  # see Branch; who measures sets it
        # Counts a row's residents, so that a result for an earlier one is recognised.
        self.generations = np.zeros(max_rows, np.int64)
        self.num_left = 0  # residents that left, of all rows
        self.branches: list[Branch | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows without a branch."""
        return len(self._free)

    def enter(self, branch: Branch, num_candidates: int) -> int:
        """Give the branch a row and copy its tokens there."""
        row, request = self._free.pop(), branch.request
        count = len(branch.token_ids)
        self.tokens[row, :count] = branch.token_ids
        self.num_tokens[row] = count
        self.num_planned[row] = 0
        self.max_total_tokens[row] = request.max_total_tokens
        self.frontends[row] = request.frontend
        self.request_ids[row] = request.request_id
        self.branch_indexes[row] = branch.index
        self.num_candidates[row] = num_candidates
        self.is_driven[row] = request.beam is not None
        self.is_known[row] = False
        self.last_token_ns[row] = branch.last_token_ns
        self.branches[row] = branch
        branch.row = row
        return row

    def leave(self, branch: Branch) -> int:
        """Take the branch's row away."""
        row = branch.row
        assert self.branches[row] is branch, row
        branch.row = NO_ROW
        branch.last_token_ns = int(self.last_token_ns[row])
        self.branches[row] = None
        self.generations[row] += 1
        self.num_left += 1
        self._free.append(row)
        return row

    def known_tokens(self, row: int) -> TokenIds:
        """Prompt and committed output of a row that samples [num_tokens]."""
        return self.tokens[row, : self.num_tokens[row]].copy()

    def resident(self, row: int) -> Branch:
        """The branch in a row that has one."""
        branch = self.branches[row]
        assert branch is not None, row
        return branch

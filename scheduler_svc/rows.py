"""Columns over the executor's rows: the state of running requests, ready for vector operations."""

from __future__ import annotations

import numpy as np

from scheduler_svc.request import NO_ROW, Request


class Rows:
    """One entry per executor row. A step touches only columns, never a request per row.

    A running request's tokens are positions of the sequence:
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
        # Counts a row's residents, so that a result for an earlier one is recognised.
        self.generations = np.zeros(max_rows, np.int64)
        self.requests: list[Request | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows without a request."""
        return len(self._free)

    def enter(self, request: Request) -> int:
        """Give the request a row and copy its tokens there."""
        row = self._free.pop()
        count = len(request.token_ids)
        self.tokens[row, :count] = request.token_ids
        self.num_tokens[row] = count
        self.num_planned[row] = 0
        self.max_total_tokens[row] = request.max_total_tokens
        self.frontends[row] = request.frontend
        self.request_ids[row] = request.request_id
        self.requests[row] = request
        request.row = row
        return row

    def leave(self, request: Request) -> int:
        """Take the request's row away; its tokens go back into the request."""
        row = request.row
        assert self.requests[row] is request, row
        request.token_ids = self.tokens[row, : self.num_tokens[row]].copy()
        request.row = NO_ROW
        self.requests[row] = None
        self.generations[row] += 1
        self._free.append(row)
        return row

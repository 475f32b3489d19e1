"""The rows that the executor keeps between steps: block tables, lengths, tokens, sampling.

Columns are numpy arrays indexed by row, so that a steady decode step costs a few gathers whatever
the batch. Nothing here validates: plan_check has seen every plan before `apply` does.

A row's tokens, as half-open intervals of positions:
    [0, num_computed_tokens)           KV is in the row's blocks
    [num_computed_tokens, num_tokens)  known, not computed: ids that a plan delivered, or one id
                                       that was sampled last and is on the device only
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import NewRows, Plan, U32Array
from executor_svc.runner import LAST_SAMPLED, IntArray, RunnerInfo, StepBatch

_SAMPLING: Final = {
    "temperature": np.float32,
    "top_k": np.uint32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seeds": np.uint64,
    "branches": np.uint32,
    "flags": np.uint32,
    "num_candidates": np.uint32,
    "num_prompt_tokens": np.uint32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
}
_LENGTHS: Final = ("num_blocks", "num_computed_tokens", "num_tokens", "next_input", "is_pending")


class TokenLog:
    """Token ids of one row from position `start` on; grows at its end only.

    One thread may append while others read: a reader sees some prefix of the log.
    """

    def __init__(self, start: int, ids: U32Array) -> None:
        self._start = start
        self._ids = ids.copy()
        self._length = ids.size

    @property
    def end(self) -> int:
        """One past the last position held."""
        return self._start + self._length

    def append(self, token_id: int) -> None:
        """Add the id of position `end`."""
        if self._length == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros(self._length + 16, np.uint32)])
        self._ids[self._length] = token_id
        self._length += 1

    def span(self, begin: int, end: int) -> U32Array:
        """Ids of the positions [begin, end)."""
        assert self._start <= begin <= end <= self.end, (begin, end, self._start, self.end)
        return self._ids[begin - self._start : end - self._start]

    def copy(self) -> TokenLog:
        """A log of its own with the same ids."""
        return TokenLog(self._start, self.span(self._start, self.end))


class RowState:
    """All rows of one epoch. Not thread-safe: it belongs to the launching thread."""

    # Sampling, fixed for a row's life; all [max_rows].
    temperature: npt.NDArray[np.float32]
    top_k: U32Array
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]
    branches: U32Array
    flags: U32Array
    num_candidates: U32Array
    num_prompt_tokens: U32Array
    repetition_penalty: npt.NDArray[np.float32]
    presence_penalty: npt.NDArray[np.float32]
    frequency_penalty: npt.NDArray[np.float32]

    def __init__(self, info: RunnerInfo) -> None:
        max_rows = info.max_rows
        max_blocks_per_row = min(
            -(-info.max_model_len // info.block_size), info.num_device_blocks - 1
        )
        # Entries from num_blocks on are left over from earlier tables.
        self.block_table = np.zeros((max_rows, max_blocks_per_row), np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)
        self.num_computed_tokens = np.zeros(max_rows, np.int32)
        self.num_tokens = np.zeros(max_rows, np.int32)
        self.is_live = np.zeros(max_rows, np.bool_)
        # Input of a row that has one known token to compute: an id, or LAST_SAMPLED.
        self.next_input = np.full(max_rows, LAST_SAMPLED, np.int32)
        # Whether the next inputs are delivered ids, in the row's log.
        self.is_pending = np.zeros(max_rows, np.bool_)
        # Rows of the last plan's batch.
        self.batch_rows: IntArray = np.empty(0, np.int32)
        self._logs: dict[int, TokenLog] = {}
        for name, dtype in _SAMPLING.items():
            setattr(self, name, np.zeros(max_rows, dtype))

    def reset(self) -> None:
        """Drop all rows: a new epoch."""
        self.is_live[:] = False
        self.is_pending[:] = False
        self.batch_rows = np.empty(0, np.int32)
        self._logs.clear()

    def history(self, row: int) -> U32Array:
        """Ids [n] of a live row with FLAG_HISTORY, from position 0 on.

        n is less than num_tokens[row] by the tokens that were sampled in steps whose results are
        not on the host yet; those are on the device.
        """
        log = self._logs[row]
        return log.span(0, log.end)

    def apply(self, plan: Plan) -> StepBatch:
        """Change the rows as a checked plan says, in the proto's order, and lay out its batch."""
        if plan.freed_rows.size:
            self._free(plan.freed_rows)
        if plan.fork_src_rows.size:
            self._fork(plan)
        if plan.new_rows.rows.size:
            self._begin(plan.new_rows)
        if plan.append_rows.size:
            self._append(plan)
        if plan.input_rows.size:
            self._set_inputs(plan.input_rows, plan.input_token_ids)
        return self._advance(plan)

    def growing_logs(self, batch: StepBatch) -> list[tuple[TokenLog, int]]:
        """Histories that the results of a batch just applied extend, each with its sample index.

        Scheduler-driven rows are not among them: their history grows by `inputs`.
        """
        flags = self.flags[batch.sampling_rows]
        grows = flags & (pb.ROW_FLAG_HISTORY | pb.ROW_FLAG_DRIVEN) == pb.ROW_FLAG_HISTORY
        return [(self._logs[int(batch.sampling_rows[i])], int(i)) for i in grows.nonzero()[0]]

    def _free(self, rows: U32Array) -> None:
        self.is_live[rows] = False
        self.is_pending[rows] = False
        for row in rows.tolist():
            self._logs.pop(row, None)

    def _fork(self, plan: Plan) -> None:
        src, dst = plan.fork_src_rows, plan.fork_dst_rows
        logs = [self._logs.get(row) for row in src.tolist()]
        # A row that begins by a fork takes the source's sampling; a live one keeps its own.
        begins = ~self.is_live[dst]
        for name in _SAMPLING:
            column = getattr(self, name)
            column[dst[begins]] = column[src[begins]]
        for name in _LENGTHS:
            column = getattr(self, name)
            column[dst] = column[src]
        num_blocks = self.num_blocks[dst]
        width = int(num_blocks.max())
        self.block_table[dst, :width] = self.block_table[src, :width]
        tails = plan.fork_tail_dst_block_ids
        replaced = tails > 0
        self.block_table[dst[replaced], num_blocks[replaced] - 1] = tails[replaced]
        self.is_live[dst] = True
        for row, log in zip(dst.tolist(), logs, strict=True):
            self._logs.pop(row, None)
            if log is not None:
                self._logs[row] = log.copy()

    def _begin(self, new: NewRows) -> None:
        rows = new.rows
        for name in _SAMPLING:
            getattr(self, name)[rows] = getattr(new, name)
        self.num_blocks[rows] = new.block_counts
        self.num_computed_tokens[rows] = new.num_computed_tokens
        self.num_tokens[rows] = new.num_tokens
        self.next_input[rows] = LAST_SAMPLED
        self.is_pending[rows] = new.num_computed_tokens < new.num_tokens
        self.is_live[rows] = True
        first_block = first_token = 0
        columns = (rows, new.block_counts, new.first_sent_token, new.num_sent_tokens)
        for row, num_blocks, start, length in zip(*(c.tolist() for c in columns), strict=True):
            blocks = new.block_ids[first_block : first_block + num_blocks]
            self.block_table[row, :num_blocks] = blocks
            first_block += num_blocks
            if length:
                self._logs[row] = TokenLog(start, new.token_ids[first_token : first_token + length])
                first_token += length

    def _append(self, plan: Plan) -> None:
        rows, counts = plan.append_rows, plan.append_counts
        first = self.num_blocks[rows]
        if rows.size == plan.append_block_ids.size and counts.all():
            self.block_table[rows, first] = plan.append_block_ids
        else:
            offsets = ranges(counts) + np.repeat(first, counts)
            self.block_table[np.repeat(rows, counts), offsets] = plan.append_block_ids
        self.num_blocks[rows] = first + counts

    def _set_inputs(self, rows: U32Array, token_ids: U32Array) -> None:
        self.next_input[rows] = token_ids
        self.num_tokens[rows] += 1
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            if self.flags[row] & pb.ROW_FLAG_HISTORY:
                self._logs[row].append(token_id)

    def _advance(self, plan: Plan) -> StepBatch:
        if plan.same_batch:
            rows = self.batch_rows
            counts: IntArray = np.ones(rows.size, np.int32)
            num_decode_rows = rows.size
        else:
            rows = plan.batch_rows.astype(np.int32)
            counts = plan.num_scheduled_tokens.astype(np.int32)
            num_decode_rows = plan.num_decode_rows
        self.batch_rows = rows
        at = rows.astype(np.intp)  # other types of index are converted at every use
        computed = self.num_computed_tokens[at]
        ends = computed + counts
        is_sampling = ends == self.num_tokens[at]
        last_tokens = np.cumsum(counts, dtype=np.int32) - 1
        sampling_rows, logits_indices = rows[is_sampling], last_tokens[is_sampling]
        if np.count_nonzero(plan.new_rows.logits_from):
            borrowers, borrowed = self._borrow(plan.new_rows, rows, last_tokens)
            sampling_rows = np.concatenate([sampling_rows, borrowers])
            logits_indices = np.concatenate([logits_indices, borrowed])
        sampling_at = sampling_rows.astype(np.intp)
        sample_positions = self.num_tokens[sampling_at]
        token_ids = self._input_tokens(at, computed, counts, last_tokens)
        self.num_computed_tokens[at] = ends
        is_driven = self.flags[sampling_at] & pb.ROW_FLAG_DRIVEN != 0
        self.num_tokens[sampling_at] = sample_positions + ~is_driven
        self.next_input[sampling_at] = LAST_SAMPLED
        return StepBatch(
            rows=rows,
            num_scheduled_tokens=counts,
            num_computed_tokens=computed,
            num_decode_rows=num_decode_rows,
            token_ids=token_ids,
            sampling_rows=sampling_rows,
            logits_indices=logits_indices,
            sample_positions=sample_positions,
        )

    def _borrow(
        self, new: NewRows, rows: IntArray, last_tokens: IntArray
    ) -> tuple[IntArray, IntArray]:
        """New rows that sample from another row's logits, and where those are in the batch."""
        is_borrowing = new.logits_from > 0
        index_of_row = np.zeros(self.is_live.size, np.intp)
        index_of_row[rows] = np.arange(rows.size)
        sources = index_of_row[new.logits_from[is_borrowing] - 1]
        return new.rows[is_borrowing].astype(np.int32), last_tokens[sources]

    def _input_tokens(
        self,
        rows: npt.NDArray[np.intp],
        computed: IntArray,
        counts: IntArray,
        last_tokens: IntArray,
    ) -> IntArray:
        """Flattened input ids [num_tokens] of a batch; logs that are used up are dropped."""
        inputs = self.next_input[rows]
        token_ids: IntArray = inputs
        if rows.size and last_tokens[-1] + 1 != rows.size:
            token_ids = np.repeat(inputs, counts)
        for index in self.is_pending[rows].nonzero()[0].tolist():
            row, begin, count = int(rows[index]), int(computed[index]), int(counts[index])
            last = int(last_tokens[index])
            token_ids[last + 1 - count : last + 1] = self._logs[row].span(begin, begin + count)
            if begin + count == self.num_tokens[row]:
                self.is_pending[row] = False
                if not self.flags[row] & pb.ROW_FLAG_HISTORY:
                    del self._logs[row]
        return token_ids


def ranges(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """0..counts[0]-1, 0..counts[1]-1, ... flattened [sum(counts)]; counts [n]."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    total = int(counts.sum(dtype=np.int64))
    offsets: npt.NDArray[np.int64] = np.arange(total) - np.repeat(starts, counts)
    return offsets

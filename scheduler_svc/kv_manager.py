"""The logical-to-physical mapping: one block table per row, grown a block at a time.

Token position p of a row lives in block `table[row, p // block_size]` at offset `p % block_size`.
Tables are append-only while a row lives, so the executor is only ever told what was appended.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler_svc.block_pool import BlockIds, BlockPool

RowIds = npt.NDArray[np.int64]


class KVManager:
    """Block tables of all rows over one pool."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_tokens: int) -> None:
        """Manage `num_blocks` ids (padding included) for rows of at most `max_tokens` tokens."""
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._table = np.zeros((max_rows, self.blocks_for(max_tokens)), np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)  # [max_rows], table lengths
        # Blocks that a row was admitted on but does not hold yet; admission counts them as taken.
        self._promised = np.zeros(max_rows, np.int32)
        self._num_promised = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` token states."""
        return -(-num_tokens // self.block_size)

    @property
    def num_unpromised(self) -> int:
        """Free blocks that no admitted row counts on. Negative when decode rows took them."""
        return self.pool.num_free - self._num_promised

    def table(self, row: int) -> BlockIds:
        """The row's block ids [num_blocks[row]]; a view."""
        return self._table[row, : self.num_blocks[row]]

    def admit(self, row: int, num_tokens: int) -> None:
        """Begin an empty row that is promised room for `num_tokens`."""
        assert self.num_blocks[row] == 0, row
        self._promised[row] = promised = self.blocks_for(num_tokens)
        self._num_promised += promised

    def missing(self, row: int, num_tokens: int) -> int:
        """Blocks to add before the row can hold `num_tokens`."""
        return max(0, self.blocks_for(num_tokens) - int(self.num_blocks[row]))

    def grow(self, row: int, num_tokens: int) -> BlockIds:
        """Append blocks so that the row holds `num_tokens`; returns the new ids."""
        start = int(self.num_blocks[row])
        block_ids = self.pool.allocate(self.missing(row, num_tokens))
        self._table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks[row] += len(block_ids)
        kept = min(int(self._promised[row]), len(block_ids))
        self._promised[row] -= kept
        self._num_promised -= kept
        return block_ids

    def full(self, rows: RowIds, num_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of `rows` [n] have no slot left after `num_tokens` [n] tokens."""
        return num_tokens >= self.num_blocks[rows] * self.block_size

    def grow_by_one(self, rows: RowIds) -> BlockIds:
        """Append one block to each of these distinct rows; returns the ids [len(rows)]."""
        block_ids = self.pool.allocate(len(rows))
        self._table[rows, self.num_blocks[rows]] = block_ids
        self.num_blocks[rows] += 1
        kept = np.minimum(self._promised[rows], 1)
        self._promised[rows] -= kept
        self._num_promised -= int(kept.sum())
        return block_ids

    def release(self, row: int) -> None:
        """End a row: drop its table and its promise."""
        self.pool.release(self.table(row))
        self.num_blocks[row] = 0
        self._num_promised -= int(self._promised[row])
        self._promised[row] = 0

    def check_conservation(self) -> None:
        """Assert that the tables are exactly what the pool counts as held."""
        held = [self.table(int(row)) for row in np.nonzero(self.num_blocks)[0]]
        holders = np.concatenate(held) if held else np.empty(0, np.int32)
        self.pool.check_conservation(holders)
        assert self._num_promised == self._promised.sum()

"""Physical KV block ids: who holds them, and which are free."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockyard.common.protocol import PADDING_BLOCK_ID

BlockIds = npt.NDArray[np.int32]


class BlockPool:
    """Reference counts over the executor's device blocks, and a stack of the free ones.

    Knows nothing of requests, rows or tokens. The stack hands out the most recently freed block
    first: its memory is the likeliest to be in a cache.
    """

    def __init__(self, num_blocks: int) -> None:
        """Create a pool of ids 0 to num_blocks - 1, of which the padding block is never free."""
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._ref_counts[PADDING_BLOCK_ID] = 1
        self._free = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)  # [num_blocks - 1], a stack
        self.num_free = num_blocks - 1

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be allocated: all but the padding block."""
        return self.num_blocks - 1

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder."""
        return self.num_usable - self.num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` free blocks [count], each with one holder. The caller checked num_free."""
        assert 0 <= count <= self.num_free, (count, self.num_free)
        top = self.num_free
        block_ids = self._free[top - count : top][::-1].copy()
        self.num_free = top - count
        self._ref_counts[block_ids] = 1
        return block_ids

    def share(self, block_ids: BlockIds) -> None:
        """Add one holder to each of these distinct, held blocks."""
        assert (self._ref_counts[block_ids] > 0).all(), "sharing a free block"
        self._ref_counts[block_ids] += 1

    def release(self, block_ids: BlockIds) -> None:
        """Take one holder away from each of these distinct blocks; free those without one."""
        counts = self._ref_counts[block_ids] - 1
        assert (counts >= 0).all(), "releasing a free block"
        self._ref_counts[block_ids] = counts
        freed = block_ids[counts == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def check_conservation(self, holders: npt.NDArray[np.integer]) -> None:
        """Assert that `holders` [n], one id per reference held, is exactly what the pool counts.

        O(num_blocks): for tests and for an idle engine.
        """
        expected = np.bincount(holders, minlength=self.num_blocks)
        expected[PADDING_BLOCK_ID] += 1
        assert (expected == self._ref_counts).all(), np.nonzero(expected != self._ref_counts)
        free = self._free[: self.num_free]
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert (self._ref_counts[free] == 0).all(), "a held block is free"
        assert self.num_free + np.count_nonzero(self._ref_counts) == self.num_blocks

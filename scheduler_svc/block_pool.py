"""Physical block ids of one pool: who holds them, what they hold, and which are free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from scheduler_svc.prefix_cache import BlockHash

BlockIds = npt.NDArray[np.int32]


class BlockPool:
    """Reference counts, a stack of blank blocks, and the cached blocks in order of last use.

    A block is held (it has holders), cached (nobody holds it, but its content has a name and can
    be taken up again) or blank. Cached and blank blocks are both free: allocation takes blank ones
    first, then evicts the cached block that was let go longest ago. Knows nothing of requests,
    rows or tokens.
    """

    def __init__(
        self,
        num_blocks: int,
        num_reserved: int = 0,
        on_evict: Callable[[list[int], list[BlockHash]], None] | None = None,
    ) -> None:
        """Create a pool of ids 0 to num_blocks - 1.

        Args:
            num_blocks: reserved ones included.
            num_reserved: the first ids, which are never allocated.
            on_evict: called with blocks' ids and names before they are handed out again.
        """
        assert 0 <= num_reserved <= num_blocks, (num_reserved, num_blocks)
        self.num_blocks = num_blocks
        self.num_reserved = num_reserved
        self.num_references = 0  # holders of all blocks together
        self.num_evicted = 0
        self._on_evict = on_evict
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._blank = np.arange(num_blocks - 1, num_reserved - 1, -1, dtype=np.int32)  # a stack
        self._num_blank = num_blocks - num_reserved
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._ids: dict[BlockHash, int] = {}  # the inverse of _hashes
        # Least recently held first. Not a plain dict: taken from in front, it would leave holes
        # that every look for the first one must step over.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be allocated."""
        return self.num_blocks - self.num_reserved

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return self._num_blank + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder whose content can be taken up again."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder."""
        return self.num_usable - self.num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` free blocks [count], each with one holder. The caller checked num_free."""
        assert 0 <= count <= self.num_free, (count, self.num_free)
        num_blank = min(count, self._num_blank)
        top = self._num_blank
        block_ids = self._blank[top - num_blank : top][::-1].copy()
        self._num_blank = top - num_blank
        if num_blank < count:
            block_ids = np.concatenate([block_ids, self._evict(count - num_blank)])
        self._ref_counts[block_ids] = 1
        self.num_references += count
        return block_ids

    def _evict(self, count: int) -> BlockIds:
        """Take the cached blocks that were let go longest ago [count]."""
        ids, known, take_first = self._ids, self._hashes, self._cached.popitem
        evicted, hashes = [], []
        for _ in range(count):
            block_id, _ = take_first(last=False)
            block_hash = known[block_id]
            assert block_hash is not None, "a cached block has no name"
            known[block_id] = None
            del ids[block_hash]
            evicted.append(block_id)
            hashes.append(block_hash)
        self.num_evicted += count
        if self._on_evict is not None:
            self._on_evict(evicted, hashes)
        return np.array(evicted, np.int32)

    def share(self, block_ids: BlockIds) -> int:
        """Add one holder to each of these distinct blocks, held or cached.

        Returns how many of them were cached, and so are no longer free.
        """
        is_unheld = self._ref_counts[block_ids] == 0
        taken = block_ids[is_unheld].tolist()
        for block_id in taken:
            del self._cached[block_id]  # KeyError: a blank block cannot be shared
        self._ref_counts[block_ids] += 1
        self.num_references += len(block_ids)
        return len(taken)

    def release(self, block_ids: BlockIds) -> None:
        """Take one holder away from each of these distinct blocks.

        Of those that have none left, the named ones become cached, the last of them first to be
        evicted: the end of a sequence is of less use than its beginning. The others become blank.
        """
        counts = self._ref_counts[block_ids] - 1
        assert (counts >= 0).all(), "releasing a free block"
        self._ref_counts[block_ids] = counts
        self.num_references -= len(block_ids)
        freed = block_ids[counts == 0]
        known = self._hashes
        named = [block_id for block_id in freed[::-1].tolist() if known[block_id] is not None]
        if named:
            self._cached.update(dict.fromkeys(named))
            freed = np.array([i for i in freed.tolist() if known[i] is None], np.int32)
        self._push_blank(freed)

    def _push_blank(self, block_ids: BlockIds) -> None:
        self._blank[self._num_blank : self._num_blank + len(block_ids)] = block_ids
        self._num_blank += len(block_ids)

    # ---- names of contents

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with this content, held or cached; None if there is none."""
        return self._ids.get(block_hash)

    def name(self, block_ids: BlockIds, hashes: Sequence[BlockHash]) -> None:
        """Let these held blocks [n] be found by their content, whose hashes are parallel.

        There is one block per content and one content per block: what exists stays.
        """
        ids, known = self._ids, self._hashes
        for block_id, block_hash in zip(block_ids.tolist(), hashes, strict=True):
            if known[block_id] is None and block_hash not in ids:
                ids[block_hash] = block_id
                known[block_id] = block_hash

    def forget(self, block_ids: BlockIds) -> None:
        """Let these blocks no longer be found: what they hold is wrong."""
        for block_id in block_ids.tolist():
            block_hash = self._hashes[block_id]
            if block_hash is None:
                continue
            self._hashes[block_id] = None
            del self._ids[block_hash]
            if block_id in self._cached:
                del self._cached[block_id]
                self._push_blank(np.array([block_id], np.int32))

    def forget_cached(self) -> int:
        """Make all cached blocks blank; returns how many there were."""
        cached = np.array(list(self._cached), np.int32)
        self.forget(cached)
        return len(cached)

    def ref_counts(self, block_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """Holders of each of these blocks [n]."""
        counts: npt.NDArray[np.int32] = self._ref_counts[block_ids]
        return counts

    def check_conservation(self, holders: npt.NDArray[np.integer]) -> None:
        """Assert that `holders` [n], one id per reference held, is exactly what the pool counts.

        O(num_blocks): for tests and for an idle engine.
        """
        expected = np.bincount(holders, minlength=self.num_blocks)
        assert (expected == self._ref_counts).all(), np.nonzero(expected != self._ref_counts)
        assert self.num_references == len(holders), (self.num_references, len(holders))
        free = np.concatenate(
            [self._blank[: self._num_blank], np.array(list(self._cached), np.int32)]
        )
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert (self._ref_counts[free] == 0).all(), "a held block is free"
        assert self.num_free + np.count_nonzero(self._ref_counts) == self.num_usable
        names = {h: block_id for block_id, h in enumerate(self._hashes) if h is not None}
        assert names == self._ids
        assert set(self._cached) <= set(names.values()), "a cached block has no name"

"""The logical-to-physical mapping: one block table per row, over a device and a host pool.

Token position p of a row lives in block `table[row, p // block_size]` at offset `p % block_size`.
Tables only grow while a row lives, except where a beam takes over another's; so the executor is
told what was appended, and which rows fork.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler_svc.block_pool import BlockIds, BlockPool
from scheduler_svc.limits import Limits
from scheduler_svc.prefix_cache import BlockHash
from scheduler_svc.request import Branch
from scheduler_svc.step_plan import Moves, RowIds


class CachedBlock(NamedTuple):
    """Where one block of a prefix was found."""

    block_id: int
    is_on_host: bool


class KVManager:
    """Block tables of all rows; which blocks they share; what moves between the pools."""

    def __init__(self, limits: Limits) -> None:
        """Manage the pools and rows of one executor, all empty."""
        self._limits = limits
        self.block_size = limits.block_size
        # Whether blocks that are evicted from the device are worth a copy on the host.
        self.keeps_evicted = True
        on_evict = self._spill if limits.num_host_blocks else None
        self.pool = BlockPool(limits.num_device_blocks, num_reserved=1, on_evict=on_evict)
        self.host = BlockPool(limits.num_host_blocks)
        max_rows = limits.max_num_seqs
        self._table = np.zeros((max_rows, limits.blocks_for(limits.max_total_tokens)), np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)  # [max_rows], table lengths
        self._num_named = np.zeros(max_rows, np.int32)  # leading blocks that were given a name
        # Free blocks that a row was admitted on and has not taken yet; admission counts them out.
        self._promised = np.zeros(max_rows, np.int32)
        self._num_promised = 0
        # Blocks held over time [block * ns], up to the last change of the table.
        self._held_block_ns = np.zeros(max_rows, np.int64)
        self._changed_ns = np.zeros(max_rows, np.int64)
        self._now_ns = 0
        self._moves = Moves()
        # Copies of partial blocks, by the plan being built and by the next; both ends are held.
        self._copies_now: list[tuple[int, int]] = []
        self._copies_due: list[tuple[int, int]] = []
        self._written_host_ids: set[int] = set()  # by the plan being built; held until it is sent
        self._read_host_ids: set[int] = set()  # likewise
        self.num_copied = 0
        self.num_swapped_out = 0
        self.num_swapped_in = 0

    # ---- one plan

    def begin_plan(self, now_ns: int) -> None:
        """Start a plan; changes from here on are dated `now_ns`."""
        self._now_ns = now_ns
        self._copies_now, self._copies_due = self._copies_due, []
        self._moves.copy = self._copies_now.copy()

    def end_plan(self) -> Moves:
        """The block copies of the plan, which is sent."""
        moves, self._moves = self._moves, Moves()
        for pair in self._copies_now:
            self.pool.release(np.array(pair, np.int32))
        self._copies_now = []
        for host_ids in (self._written_host_ids, self._read_host_ids):
            if host_ids:
                self.host.release(np.array(list(host_ids), np.int32))
                host_ids.clear()
        self.num_copied += len(moves.copy)
        self.num_swapped_out += len(moves.swap_out)
        self.num_swapped_in += len(moves.swap_in)
        return moves

    # ---- admission

    @property
    def num_unpromised(self) -> int:
        """Free blocks that no admitted row counts on. Negative when decode rows took them."""
        return self.pool.num_free - self._num_promised

    def find(self, branch: Branch) -> list[CachedBlock]:
        """The longest prefix of the branch's tokens that either pool has, without the last token.

        A host block that the plan being built writes is not there yet.
        """
        found = []
        find_on_device, find_on_host = self.pool.find, self.host.find
        num_blocks = (len(branch.token_ids) - 1) // self.block_size
        for block_hash in branch.block_hashes[:num_blocks]:
            if (block_id := find_on_device(block_hash)) is not None:
                found.append(CachedBlock(block_id, False))
                continue
            host_id = find_on_host(block_hash)
            if host_id is None or host_id in self._written_host_ids:
                break
            found.append(CachedBlock(host_id, True))
        return found

    def num_held(self, found: list[CachedBlock]) -> int:
        """How many of these blocks take no free block: somebody holds them on the device."""
        if not found:
            return 0
        device_ids = [block.block_id for block in found if not block.is_on_host]
        return int((self.pool.ref_counts(np.array(device_ids, np.int64)) > 0).sum())

    def promise(self, row: int, num_blocks: int) -> None:
        """Begin an empty row that may count on `num_blocks` free blocks."""
        assert self.num_blocks[row] == 0, row
        self._promised[row] = num_blocks
        self._num_promised += num_blocks
        self._held_block_ns[row] = 0
        self._changed_ns[row] = self._now_ns

    def adopt(self, row: int, branch: Branch, found: list[CachedBlock]) -> None:
        """Fill the table of an empty row with a prefix; host blocks come back by `swap_in`."""
        if found:
            is_on_host = np.array([block.is_on_host for block in found])
            block_ids = np.array([block.block_id for block in found], np.int32)
            # All are held before anything is allocated, and so possibly evicted.
            self._redeem(row, self.pool.share(block_ids[~is_on_host]))
            if is_on_host.any():
                self._fetch(branch, block_ids, np.flatnonzero(is_on_host))
                self._redeem(row, int(is_on_host.sum()))
            self._table[row, : len(found)] = block_ids
            self.num_blocks[row] = self._num_named[row] = len(found)
            self._changed_ns[row] = self._now_ns
        self.unpin(branch)

    def _fetch(self, branch: Branch, block_ids: BlockIds, indexes: npt.NDArray[np.int64]) -> None:
        """Replace the host ids at these indexes of a prefix by device blocks that get a copy."""
        host_ids = block_ids[indexes]
        self.host.share(host_ids)
        self._read_host_ids.update(host_ids.tolist())
        fetched = self.pool.allocate(len(host_ids))
        self._moves.swap_in.extend(zip(host_ids.tolist(), fetched.tolist(), strict=True))
        branch.request.blocks.num_swapped_in += len(host_ids)
        block_ids[indexes] = fetched
        self.pool.name(fetched, [branch.block_hashes[index] for index in indexes])

    # ---- growth

    def table(self, row: int) -> BlockIds:
        """The row's block ids [num_blocks[row]]; a view."""
        return self._table[row, : self.num_blocks[row]]

    def missing(self, row: int, num_tokens: int) -> int:
        """Blocks to add before the row can hold `num_tokens`."""
        return max(0, self._limits.blocks_for(num_tokens) - int(self.num_blocks[row]))

    def grow(self, row: int, num_tokens: int) -> BlockIds:
        """Append blocks so that the row holds `num_tokens`; returns the new ids."""
        self._account(np.array([row]))
        start = int(self.num_blocks[row])
        block_ids = self.pool.allocate(self.missing(row, num_tokens))
        self._table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks[row] += len(block_ids)
        self._redeem(row, len(block_ids))
        return block_ids

    def full(self, rows: RowIds, num_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of `rows` [n] have no slot left after `num_tokens` [n] tokens."""
        return num_tokens >= self.num_blocks[rows] * self.block_size

    def grow_by_one(self, rows: RowIds) -> BlockIds:
        """Append one block to each of these distinct rows; returns the ids [len(rows)]."""
        self._account(rows)
        block_ids = self.pool.allocate(len(rows))
        self._table[rows, self.num_blocks[rows]] = block_ids
        self.num_blocks[rows] += 1
        kept = np.minimum(self._promised[rows], 1)
        self._promised[rows] -= kept
        self._num_promised -= int(kept.sum())
        return block_ids

    def _redeem(self, row: int, num_blocks: int) -> None:
        kept = min(int(self._promised[row]), num_blocks)
        self._promised[row] -= kept
        self._num_promised -= kept

    def _account(self, rows: RowIds) -> None:
        """Close the interval in which these rows' tables were as they are."""
        elapsed_ns = self._now_ns - self._changed_ns[rows]
        self._held_block_ns[rows] += self.num_blocks[rows] * elapsed_ns
        self._changed_ns[rows] = self._now_ns

    # ---- forks

    def fork(self, src: int, branch: Branch, num_tokens: int, *, is_now: bool) -> int:
        """Give the branch's row the first `num_tokens` tokens of row `src` in place of its own.

        Full blocks are shared. The partial one, if any, gets a copy, which is in this plan if its
        tokens are stored already (`is_now`), else in the next. Returns the copy's id or 0.
        """
        dst, usage = branch.row, branch.request.blocks
        num_full, has_tail = num_tokens // self.block_size, num_tokens % self.block_size > 0
        self._account(np.array([dst]))
        shared = self._table[src, :num_full].copy()
        usage.num_shared += num_full - int(np.isin(shared, self.table(dst)).sum())
        self.pool.share(shared)
        self._drop_table(dst)
        self._table[dst, :num_full] = shared
        self.num_blocks[dst] = num_full + has_tail
        if not has_tail:
            return 0
        (tail,) = self.pool.allocate(1)
        self._redeem(dst, 1)
        usage.num_copied += 1
        self._table[dst, num_full] = tail
        pair = (int(self._table[src, num_full]), int(tail))
        if is_now:
            self._moves.copy.append(pair)
        else:
            self.pool.share(np.array(pair, np.int32))
            self._copies_due.append(pair)
        return int(tail)

    def _drop_table(self, row: int) -> None:
        self.pool.release(self.table(row))
        self.num_blocks[row] = self._num_named[row] = 0
        if self._copies_due:
            self._drop_useless_copies()

    def _drop_useless_copies(self) -> None:
        """A row that ends before its copy was made needs it no more."""
        useless = [
            pair for pair in self._copies_due if self.pool.ref_counts(np.array(pair))[1] == 1
        ]
        for pair in useless:
            self._copies_due.remove(pair)
            self.pool.release(np.array(pair, np.int32))

    # ---- the end of a row

    def empty(self, row: int) -> None:
        """Drop a row's table."""
        self._account(np.array([row]))
        self._drop_table(row)

    def release(self, row: int) -> int:
        """End a row: drop its table and its promise; returns what it held [block * ns]."""
        self.empty(row)
        self._num_promised -= int(self._promised[row])
        self._promised[row] = 0
        return int(self._held_block_ns[row])

    def name_blocks(self, row: int, hashes: list[BlockHash], count: int) -> None:
        """Let the row's first `count` blocks be found by their hashes."""
        begin = int(self._num_named[row])
        if begin < count:
            self.pool.name(self._table[row, begin:count], hashes[begin:count])
            self._num_named[row] = count

    def forget_blocks(self, hashes: list[BlockHash]) -> None:
        """Let nothing be found by these hashes, in either pool: the KV is wrong."""
        for pool in (self.pool, self.host):
            found = [i for i in map(pool.find, hashes) if i is not None]
            pool.forget(np.array(found, np.int32))

    # ---- the host pool

    def private_blocks(self, row: int, hashes: list[BlockHash]) -> list[int]:
        """Indexes of the row's leading len(hashes) blocks that only it holds and the host lacks."""
        counts = self.pool.ref_counts(self._table[row, : len(hashes)])
        alone = np.flatnonzero(counts == 1).tolist()
        return [i for i in alone if self.host.find(hashes[i]) is None]

    def swap_out(self, row: int, branch: Branch, hashes: list[BlockHash]) -> None:
        """Keep the row's leading len(hashes) blocks on the host, pinned, until the branch runs.

        Blocks that other rows hold stay where they are. The caller checked the host's room.
        """
        private = self.private_blocks(row, hashes)
        self._copy_to_host(self._table[row, private].tolist(), [hashes[i] for i in private])
        branch.request.blocks.num_swapped_out += len(private)
        found = [host_id for h in hashes if (host_id := self.host.find(h)) is not None]
        self.host.share(np.array(found, np.int32))
        branch.host_block_ids = found

    def unpin(self, branch: Branch) -> None:
        """The branch needs its host blocks no more; they stay cached."""
        if branch.host_block_ids:
            self.host.release(np.array(branch.host_block_ids, np.int32))
            branch.host_block_ids = []

    def _spill(self, block_ids: list[int], hashes: list[BlockHash]) -> None:
        """Evicted device blocks live on in the host pool, if that pays and as far as it has room.

        Of a prefix, the end is evicted first; its beginning is of more use.
        """
        if not self.keeps_evicted:
            return
        find = self.host.find
        missing = [i for i, block_hash in enumerate(hashes) if find(block_hash) is None]
        missing = missing[max(0, len(missing) - self.host.num_free) :]
        self._copy_to_host([block_ids[i] for i in missing], [hashes[i] for i in missing])

    def _copy_to_host(self, block_ids: list[int], hashes: list[BlockHash]) -> None:
        """Let this plan copy device blocks to named host blocks, held until it is sent."""
        host_ids = self.host.allocate(len(block_ids))
        self.host.name(host_ids, hashes)
        self._written_host_ids.update(host_ids.tolist())
        self._moves.swap_out.extend(zip(block_ids, host_ids.tolist(), strict=True))

    # ---- checks

    def num_saved_blocks(self) -> int:
        """Blocks that sharing saves: table entries of all rows, less the blocks they name."""
        copying = Counter(
            block_id for pair in self._copies_now + self._copies_due for block_id in pair
        )
        ids = np.array(list(copying), np.int64)
        # The row that had a block to be copied may have ended.
        orphans = self.pool.ref_counts(ids) == np.array(list(copying.values()), np.int32)
        num_entries = self.pool.num_references - sum(copying.values())
        return num_entries - (self.pool.num_used - int(orphans.sum()))

    def check_conservation(self, branches: list[Branch]) -> None:
        """Assert that the tables, and what `branches` pin, are exactly what the pools count."""
        held = [self.table(int(row)) for row in np.nonzero(self.num_blocks)[0]]
        held += [np.array(pair, np.int32) for pair in self._copies_now + self._copies_due]
        self.pool.check_conservation(np.concatenate([np.empty(0, np.int32), *held]))
        pinned = [host_id for branch in branches for host_id in branch.host_block_ids]
        self.host.check_conservation(
            np.array([*pinned, *self._written_host_ids, *self._read_host_ids], np.int64)
        )
        assert self._num_promised == self._promised.sum()

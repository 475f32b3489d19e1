"""Who runs: the branches in rows, their blocks, and what is in flight for them. One epoch's."""

from __future__ import annotations

from collections import deque

import numpy as np

from scheduler_svc.kv_manager import KVManager
from scheduler_svc.limits import Limits
from scheduler_svc.prefix_cache import BlockHash, extend_hashes
from scheduler_svc.request import NO_ROW, Branch, RequestStatus
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import RowIds, StepPlan


class Residents:
    """Rows and blocks of the running branches. Only here do branches enter and leave them."""

    def __init__(self, limits: Limits, *, is_caching: bool) -> None:
        """Start with an empty executor."""
        self.rows = Rows(limits.max_num_seqs, limits.max_total_tokens)
        self.kv = KVManager(limits)
        self.running: dict[int, Branch] = {}  # key -> branch, in order of admission
        self.decoding: RowIds = np.empty(0, np.int64)  # in the order they began to decode
        self.prefilling: list[Branch] = []  # in order of admission
        self.freed_rows: list[int] = []  # not told to the executor yet
        self.in_flight: deque[StepPlan] = deque()
        # Branches that left their row with tokens under way: (row, generation) -> branch.
        self.detached: dict[tuple[int, int], Branch] = {}
        # A request that is swapped out finds its blocks again by name, without a prefix cache too.
        self._names_blocks = is_caching or limits.num_host_blocks > 0

    def enter(self, branch: Branch, num_blocks: int, num_candidates: int) -> int:
        """Let a waiting branch run in a free row that may count on `num_blocks` free blocks."""
        branch.move_to(RequestStatus.RUNNING)
        row = self.rows.enter(branch, num_candidates)
        self.kv.promise(row, num_blocks)
        self.running[branch.key] = branch
        return row

    def begin_decoding(self, branch: Branch) -> None:
        """The branch's whole prompt is planned; from now on it decodes."""
        self.decoding = np.append(self.decoding, branch.row)

    def num_known_tokens(self, branch: Branch) -> int:
        """Leading tokens of a running branch that are known and whose KV is, or will be, stored."""
        row = branch.row
        return int(min(self.rows.num_planned[row], self.rows.num_tokens[row]))

    def hash_blocks(self, branch: Branch, num_tokens: int) -> None:
        """Name the full blocks of the branch's first `num_tokens` tokens.

        Also without a prefix cache for beams: lanes that begin again must share as they did.
        """
        if self._names_blocks or branch.request.beam is not None:
            extend_hashes(
                branch.block_hashes,
                branch.request.cache_root,
                branch.token_ids,
                num_tokens,
                self.kv.block_size,
            )

    def name_blocks(self, branch: Branch, num_tokens: int) -> None:
        """Let the full blocks of a running branch's first `num_tokens` tokens be found."""
        num_full = min(num_tokens // self.kv.block_size, len(branch.block_hashes))
        self.kv.name_blocks(branch.row, branch.block_hashes, num_full)

    def settle(self, branch: Branch) -> list[BlockHash]:
        """Bring a running branch's tokens up to date; returns the hashes of its stored full blocks.

        A beam's tokens are its group's business.
        """
        if not self.rows.is_driven[branch.row]:
            branch.token_ids = self.rows.known_tokens(branch.row)
        num_known = min(self.num_known_tokens(branch), len(branch.token_ids))
        self.hash_blocks(branch, num_known)
        return branch.block_hashes[: num_known // self.kv.block_size]

    def release(self, branch: Branch) -> None:
        """Take row and blocks from a running branch; the caller changes its status.

        Its full blocks stay cached for whoever comes with the same tokens. A beam's caller has set
        token_ids and block_hashes, for its row has no tokens.
        """
        row, hashes = branch.row, self.settle(branch)
        self.kv.name_blocks(row, hashes, len(hashes))
        self.rows.leave(branch)
        branch.request.blocks.held_block_ns += self.kv.release(row)
        del self.running[branch.key]
        if branch in self.prefilling:
            self.prefilling.remove(branch)
        elif not self.rows.is_driven[row]:
            self.decoding = self.decoding[self.decoding != row]
        if self.rows.is_known[row]:
            self.freed_rows.append(row)

    def empty(self, branch: Branch) -> None:
        """Take the blocks from a running branch that keeps its row."""
        self.kv.empty(branch.row)
        self.rows.num_planned[branch.row] = 0

    def detach(self, branch: Branch) -> None:
        """Note which tokens are under way for a running branch that is about to leave its row."""
        row, generation = branch.row, int(self.rows.generations[branch.row])
        if step_ids := [p.step_id for p in self.in_flight if p.samples(row, generation)]:
            self.detached[row, generation] = branch
            branch.last_step_id = step_ids[-1]

    def has_progressed(self, branch: Branch) -> bool:
        """Whether a branch got a token since it entered its row."""
        return branch.row != NO_ROW and self.rows.num_tokens[branch.row] > len(branch.token_ids)

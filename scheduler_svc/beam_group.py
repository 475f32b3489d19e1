"""A beam search on the executor: its live beams in lanes, each lane a branch with a row.

The scheduler decides each next input, so a step is planned only when the last one's candidates
are committed. Between two steps beams change places: a lane whose beam has several successors
forks, a lane whose beam has none is overwritten.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler_svc.batch import BatchBuilder
from scheduler_svc.beam import BeamSearch
from scheduler_svc.prefix_cache import BlockHash
from scheduler_svc.request import Branch, Request, RequestStatus, TokenIds
from scheduler_svc.residents import Residents
from scheduler_svc.step_plan import FloatArray

Candidates = tuple[TokenIds, FloatArray]


class BeamGroup:
    """The state of one request's beam search, waiting or running."""

    def __init__(self, request: Request) -> None:
        """Begin at the prompt."""
        assert request.beam is not None
        self.request = request
        self.search = BeamSearch(
            request.beam,
            request.num_prompt_tokens,
            request.max_total_tokens,
            request.stop_token_ids,
            request.is_text_stopped,
        )
        self.num_streamed_tokens = 0  # of choice 0
        self._prompt_hashes: list[BlockHash] | None = None
        self._live = [0]  # lane of each live beam, best first
        self._candidates: dict[int, Candidates] = {}  # by lane
        # Once the last step is committed: which lane each live beam came from.
        self._sources: list[int] | None = None

    @property
    def lanes(self) -> list[Branch]:
        """All lanes, in use or not."""
        return self.request.branches

    @property
    def leader(self) -> Branch:
        """Stands for the group in the queue."""
        return self.request.branches[0]

    @property
    def age(self) -> tuple[int, int]:
        """Its place in the order of service, see Branch."""
        return self.leader.age

    @property
    def num_candidates(self) -> int:
        """What each lane must ask for."""
        request = self.request
        assert request.beam is not None
        return request.beam.num_candidates(
            len(request.stop_token_ids), has_stop_strings=request.is_text_stopped is not None
        )

    @property
    def is_ready(self) -> bool:
        """Whether it runs, and its next step can be planned."""
        return self._sources is not None and self.leader.status is RequestStatus.RUNNING

    # ---- waiting

    def lay_out(self, residents: Residents) -> None:
        """Give the live beams the first lanes, with their tokens and hashes, to start anew."""
        if self._prompt_hashes is None:
            self.leader.block_hashes = []
            residents.hash_blocks(self.leader, self.request.num_prompt_tokens)
            self._prompt_hashes = self.leader.block_hashes
        for index, branch in enumerate(self.lanes):
            branch.token_ids = self.request.prompt
            branch.block_hashes = self._prompt_hashes.copy()
            if index < self.search.num_beams:
                output = self.search.output_ids(index)
                branch.token_ids = np.concatenate([self.request.prompt, output])
                residents.hash_blocks(branch, len(branch.token_ids))
        self._live = list(range(self.search.num_beams))
        self._candidates = {}
        self._sources = None

    def forget_hashes(self) -> None:
        """The block size changed; `lay_out` makes new ones."""
        self._prompt_hashes = None

    def blocks_to_enter(self, residents: Residents, num_tokens: int | None) -> list[int]:
        """Blocks that each lane must be able to count on, shared ones counted once.

        Args:
            residents: for the block size.
            num_tokens: reserve room for lanes of this many tokens; None: for the next step.
        """
        block_size = residents.kv.block_size
        num_shared = self.request.num_prompt_tokens // block_size
        seen: set[BlockHash] = set()
        counts = []
        for branch in self.lanes[: len(self._live)]:
            num_full = len(branch.token_ids) // block_size
            hashes = set(branch.block_hashes[:num_full])
            counts.append(num_full - len(hashes & seen) + 1)
            seen |= hashes
        counts += [1] * (len(self.lanes) - len(counts))
        if num_tokens is not None:
            longest = -(-num_tokens // block_size)
            counts = [max(c, longest - (num_shared if i else 0)) for i, c in enumerate(counts)]
        return counts

    def live_lanes(self) -> list[Branch]:
        """Lanes that hold a beam; of a waiting group, those that must be prefilled."""
        return [self.lanes[lane] for lane in self._live]

    # ---- running

    def take(self, residents: Residents, branch: Branch, candidates: Candidates) -> bool:
        """Take one lane's candidates; True once all are there and the beams have advanced.

        Lanes whose beam has no successor let go of their blocks at once.
        """
        branch.num_suspicions = 0
        self._candidates[branch.index] = candidates
        if len(self._candidates) < len(self._live):
            return False
        taken = [self._candidates[lane] for lane in self._live]
        parents = self.search.advance([ids for ids, _ in taken], [probs for _, probs in taken])
        self._sources = [self._live[parent] for parent in parents]
        self._candidates = {}
        if not self.search.is_done:
            pruned = set(self._live) - set(self._sources)
            self.request.num_pruned_beams += len(pruned)
            for lane in pruned:
                residents.empty(self.lanes[lane])
        return True

    def num_blocks_needed(self, residents: Residents) -> int:
        """Free blocks that the next step takes."""
        assert self._sources is not None
        if self._num_stored % residents.kv.block_size:
            return len(self._sources) - len(set(self._sources))  # copies of partial blocks
        return len(self._sources)

    @property
    def _num_stored(self) -> int:
        """Tokens of each live beam but its newest."""
        return self.request.num_prompt_tokens + self.search.num_output_tokens - 1

    def plan_step(self, residents: Residents, batch: BatchBuilder) -> None:
        """Put the beams' next inputs into the batch, each in a lane with its history."""
        rows, kv, num_stored = residents.rows, residents.kv, self._num_stored
        self._live, forks = self._assign_lanes()
        for src, dst in forks:
            src_row, dst_row = self.lanes[src].row, self.lanes[dst].row
            tail_block_id = kv.fork(src_row, self.lanes[dst], num_stored, is_now=True)
            batch.add_fork(src_row, dst_row, tail_block_id)
            rows.is_known[dst_row] = True
        live_rows = np.array([branch.row for branch in self.live_lanes()], np.int64)
        rows.num_planned[live_rows] = num_stored
        grown = live_rows[kv.full(live_rows, rows.num_planned[live_rows])]
        if len(grown):
            batch.append_one_each(grown, kv.grow_by_one(grown))
        rows.num_planned[live_rows] = rows.num_tokens[live_rows] = num_stored + 1
        batch.add_driven(live_rows.tolist(), self.search.last_token_ids)
        self._sources = None

    def _assign_lanes(self) -> tuple[list[int], list[tuple[int, int]]]:
        """A lane for each live beam, and which lanes fork; a lane keeps one of its successors."""
        assert self._sources is not None
        lanes: list[int | None] = []
        kept: set[int] = set()
        for source in self._sources:
            lanes.append(None if source in kept else source)
            kept.add(source)
        spare = iter([lane for lane in range(len(self.lanes)) if lane not in kept])
        forks = []
        live = []
        for lane, source in zip(lanes, self._sources, strict=True):
            if lane is None:
                lane = next(spare)
                forks.append((source, lane))
            live.append(lane)
        return live, forks

    def settle(self) -> None:
        """Before lanes leave their rows: give each the tokens that its blocks hold."""
        held: dict[int, npt.NDArray[np.int32]] = {}
        if self.search.is_done:
            held = {lane: self.search.parent_ids(i) for i, lane in enumerate(self._live)}
        elif self._sources is None:
            held = {lane: self.search.output_ids(i) for i, lane in enumerate(self._live)}
        else:
            for index, lane in enumerate(self._sources):
                held[lane] = self.search.output_ids(index)[:-1]
        assert self._prompt_hashes is not None
        for branch in self.lanes:
            branch.block_hashes = self._prompt_hashes.copy()
            output = held.get(branch.index, np.empty(0, np.int32))
            branch.token_ids = np.concatenate([self.request.prompt, output])

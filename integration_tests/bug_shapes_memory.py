"""Bugs of the memory manager: prefixes, forks, copies, swapping. Injected like bug_shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from blockyard.executor.v1 import executor_pb2 as pb
from integration_tests.bug_shapes import Patch, change_plans
from scheduler_svc import plan_codec
from scheduler_svc.beam_group import BeamGroup, Candidates
from scheduler_svc.block_pool import BlockIds, BlockPool
from scheduler_svc.kv_manager import CachedBlock, KVManager
from scheduler_svc.prefix_cache import root_hash
from scheduler_svc.request import Branch
from scheduler_svc.residents import Residents
from scheduler_svc.step_plan import StepPlan

Pairs = list[tuple[int, int]]


# ---- prefixes


def block_named_before_it_is_full(patch: Patch) -> None:
    """The block that a chunk of prefill ends in can be found, though its rest is not computed."""
    name_blocks = Residents.name_blocks

    def buggy(self: Residents, branch: Branch, num_tokens: int) -> None:
        name_blocks(self, branch, num_tokens + self.kv.block_size - 1)

    patch.setattr(Residents, "name_blocks", buggy)


def uncomputed_block_named(patch: Patch) -> None:
    """Whatever a row that ends has blocks for can be found, though no step stored it all."""

    def buggy(self: Residents, branch: Branch) -> int:
        row, kv = branch.row, self.kv
        return int(min(self.rows.num_tokens[row], kv.num_blocks[row] * kv.block_size))

    patch.setattr(Residents, "num_known_tokens", buggy)


def hit_includes_the_last_token(patch: Patch) -> None:
    """A prompt that is cached whole leaves no token to compute, and so no logits."""

    def buggy(self: KVManager, branch: Branch) -> list[CachedBlock]:
        found = []
        for block_hash in branch.block_hashes:
            if (block_id := self.pool.find(block_hash)) is None:
                break
            found.append(CachedBlock(block_id, is_on_host=False))
        return found

    patch.setattr(KVManager, "find", buggy)


def hit_goes_on_behind_a_hole(patch: Patch) -> None:
    """Blocks behind one that neither pool has count as part of the prefix."""
    find = KVManager.find

    def buggy(self: KVManager, branch: Branch) -> list[CachedBlock]:
        found = find(self, branch)
        num_blocks = (len(branch.token_ids) - 1) // self.block_size
        for block_hash in branch.block_hashes[len(found) + 1 : num_blocks]:
            if (block_id := self.pool.find(block_hash)) is not None:
                found.append(CachedBlock(block_id, is_on_host=False))
        return found

    patch.setattr(KVManager, "find", buggy)


def _keep_names(patch: Patch, *, on_host: bool) -> None:
    allocate = BlockPool.allocate

    def buggy(self: BlockPool, count: int) -> BlockIds:
        names = dict(self._ids)
        block_ids = allocate(self, count)
        if (self.num_reserved == 0) == on_host:  # only the device pool has a padding block
            self._ids = names | self._ids
        return block_ids

    patch.setattr(BlockPool, "allocate", buggy)


def name_kept_after_eviction(patch: Patch) -> None:
    """A device block that was handed out again is still found by what it held."""
    _keep_names(patch, on_host=False)


def host_name_kept_after_eviction(patch: Patch) -> None:
    """A host block that was handed out again is still found by what it held."""
    _keep_names(patch, on_host=True)


def salt_ignored(patch: Patch) -> None:
    """Requests find the blocks of others whose salt is not theirs."""
    patch.setattr("scheduler_svc.request.root_hash", lambda _: root_hash(b""))


def failed_blocks_still_found(patch: Patch) -> None:
    """What a row computed whose logits are not finite stays cached."""
    patch.setattr(KVManager, "forget_blocks", lambda *_: None)


# ---- forks and copies


def _change_copies(plan: StepPlan, copy: Pairs) -> StepPlan:
    return dataclasses.replace(plan, moves=dataclasses.replace(plan.moves, copy=copy))


class _Late:
    """Holds pairs of one plan back until the next one of the same epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._held: Pairs = []

    def exchange(self, plan: StepPlan, pairs: Pairs) -> Pairs:
        """The pairs to send with `plan` in place of its own."""
        late = self._held if plan.epoch == self._epoch else []
        self._epoch, self._held = plan.epoch, pairs
        return late


def tail_never_copied(patch: Patch) -> None:
    """Branches that part get a block for their last tokens, but not its content."""
    change_plans(patch, lambda plan: _change_copies(plan, []))


def tail_copied_too_late(patch: Patch) -> None:
    """Copies are sent one plan late: both branches have written by then."""
    late = _Late()
    change_plans(patch, lambda p: _change_copies(p, late.exchange(p, p.moves.copy)))


def tail_copied_too_early(patch: Patch) -> None:
    """The copy of a sample's last block is in the plan that computes it, and so comes before."""
    fork = KVManager.fork

    def buggy(self: KVManager, src: int, branch: Branch, num_tokens: int, *, is_now: bool) -> int:
        return fork(self, src, branch, num_tokens, is_now=True)

    patch.setattr(KVManager, "fork", buggy)


def fork_keeps_the_old_tail(patch: Patch) -> None:
    """Two beams go on writing to the partial block that they shared."""

    def change(plan: StepPlan) -> StepPlan:
        return dataclasses.replace(plan, forks=[(src, dst, 0) for src, dst, _ in plan.forks])

    change_plans(patch, change)


def beam_inputs_exchanged(patch: Patch) -> None:
    """Beams get their next tokens in another order than their lanes."""

    def change(plan: StepPlan) -> StepPlan:
        rows, token_ids = [row for row, _ in plan.inputs], [token for _, token in plan.inputs]
        return dataclasses.replace(plan, inputs=list(zip(rows, token_ids[::-1], strict=True)))

    change_plans(patch, change)


def lane_released_though_its_beam_lives(patch: Patch) -> None:
    """The blocks of the last live beam's lane are given back with those of the dead ones."""
    take = BeamGroup.take

    def buggy(
        self: BeamGroup, residents: Residents, branch: Branch, candidates: Candidates
    ) -> bool:
        has_advanced = take(self, residents, branch, candidates)
        if has_advanced and self._sources:
            residents.kv.pool.release(residents.kv.table(self.lanes[self._sources[-1]].row))
        return has_advanced

    patch.setattr(BeamGroup, "take", buggy)


def preempted_beam_keeps_its_state(patch: Patch) -> None:
    """Candidates and successors of before a preemption count after it."""
    lay_out = BeamGroup.lay_out

    def buggy(self: BeamGroup, residents: Residents) -> None:
        candidates, sources = self._candidates, self._sources
        lay_out(self, residents)
        self._candidates, self._sources = candidates, sources

    patch.setattr(BeamGroup, "lay_out", buggy)


def branch_index_lost(patch: Patch) -> None:
    """All samples of a request draw the random numbers of the first one."""
    encode = plan_codec.encode

    def buggy(plan: StepPlan) -> pb.StepPlan:
        message = encode(plan)
        message.new_rows.ClearField("branches")
        return message

    patch.setattr(plan_codec, "encode", buggy)


def shared_block_released_twice(patch: Patch) -> None:
    """A row that ends gives up its neighbours' hold of the blocks that they share, too."""
    release = KVManager.release

    def buggy(self: KVManager, row: int) -> int:
        table = self.table(row).copy()
        held_block_ns = release(self, row)
        self.pool.release(table[self.pool.ref_counts(table) > 0])
        return held_block_ns

    patch.setattr(KVManager, "release", buggy)


# ---- swapping


def _change_swaps(plan: StepPlan, **pairs: Pairs) -> StepPlan:
    changes: dict[str, Any] = dict(pairs)
    return dataclasses.replace(plan, moves=dataclasses.replace(plan.moves, **changes))


def swap_in_forgotten(patch: Patch) -> None:
    """A table names blocks that nothing was brought back to."""
    change_plans(patch, lambda plan: _change_swaps(plan, swap_in=[]))


def swapped_out_too_late(patch: Patch) -> None:
    """Blocks are saved one plan late, when somebody else has written to them."""
    late = _Late()
    change_plans(patch, lambda p: _change_swaps(p, swap_out=late.exchange(p, p.moves.swap_out)))


def swap_pairs_mixed_up(patch: Patch) -> None:
    """Host blocks come back to each other's places."""

    def change(plan: StepPlan) -> StepPlan:
        host_ids, block_ids = ([p[i] for p in plan.moves.swap_in] for i in (0, 1))
        return _change_swaps(plan, swap_in=list(zip(host_ids, block_ids[::-1], strict=True)))

    change_plans(patch, change)


def host_block_read_while_written(patch: Patch) -> None:
    """A host block is found in the plan that is only about to write it."""
    find = KVManager.find

    def buggy(self: KVManager, branch: Branch) -> list[CachedBlock]:
        written, self._written_host_ids = self._written_host_ids, set()
        found = find(self, branch)
        self._written_host_ids = written
        return found

    patch.setattr(KVManager, "find", buggy)


def host_block_reused_while_read(patch: Patch) -> None:
    """A host block that comes back may be written by the same plan."""
    fetch = KVManager._fetch

    def buggy(
        self: KVManager, branch: Branch, block_ids: BlockIds, indexes: npt.NDArray[np.int64]
    ) -> None:
        with patch.context() as during:
            during.setattr(self.host, "share", lambda _: 0)
            fetch(self, branch, block_ids, indexes)
        self._read_host_ids.clear()

    patch.setattr(KVManager, "_fetch", buggy)

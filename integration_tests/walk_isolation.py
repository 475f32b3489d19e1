"""Who may find whose blocks. Equal tokens make equal KV, so no output shows what is wrong here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from scheduler_svc.block_pool import BlockIds
from scheduler_svc.kv_manager import KVManager
from scheduler_svc.limits import Limits
from scheduler_svc.prefix_cache import BlockHash
from scheduler_svc.request import Branch, Request, RequestStatus
from scheduler_svc.rows import Rows
from scheduler_svc.step_plan import StepPlan

Owner = tuple[bytes, int]
"""The salt; and the key of a request that shares with no other, else 0."""

NOBODY: Final[Owner] = (b"", -1)


class Isolation:
    """Follows one epoch's plans; asserts that found blocks were computed under the same salt."""

    def __init__(self, limits: Limits) -> None:
        """Nothing is computed yet."""
        self._limits = limits
        self._device: dict[int, Owner] = {}
        self._host: dict[int, Owner] = {}

    def follow(self, plan: StepPlan, rows: Rows) -> None:
        """Take the next plan; `rows` as it leaves them."""
        device, host = self._device, self._host
        host |= {dst: device.get(src, NOBODY) for src, dst in plan.moves.swap_out}
        device |= {dst: device.get(src, NOBODY) for src, dst in plan.moves.copy}
        device |= {dst: host.get(src, NOBODY) for src, dst in plan.moves.swap_in}
        appended = iter([i for ids in plan.append_block_ids for i in ids.tolist()])
        for row, count in zip(plan.append_rows, plan.append_counts, strict=True):
            owner = _owner(rows.resident(row))
            device |= {next(appended): owner for _ in range(count)}
        for new in plan.new_rows:
            num_found = self._limits.blocks_for(new.num_computed_tokens)
            if new.logits_from is None:
                self._check(new.branch, new.block_ids[:num_found])
            device |= dict.fromkeys(new.block_ids[num_found:].tolist(), _owner(new.branch))

    def _check(self, branch: Branch, block_ids: BlockIds) -> None:
        owner = _owner(branch)
        for block_id in block_ids.tolist():
            found = self._device.get(block_id, NOBODY)
            assert found == owner, f"a block of another salt: {found} found by {owner}"


def _owner(branch: Branch) -> Owner:
    request = branch.request
    if request.is_cache_private:
        return b"", request.key
    return request.cache_salt, 0


def check_forgotten(kv: KVManager, failed: Request, requests: Iterable[Request]) -> None:
    """Assert that nothing can be found any more that only failed branches of a request computed."""
    branches = [branch for request in requests for branch in request.branches]
    lost = [b for b in failed.branches if b.status is RequestStatus.FINISHED_ERROR]
    hashes = _hashes(lost) - _hashes(branch for branch in branches if branch not in lost)
    found = [h for pool in (kv.pool, kv.host) for h in hashes if pool.find(h) is not None]
    assert not found, f"{len(found)} blocks of failed request {failed.key} can be found"


def _hashes(branches: Iterable[Branch]) -> set[BlockHash]:
    return {block_hash for branch in branches for block_hash in branch.block_hashes}

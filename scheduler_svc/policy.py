"""Who gives way, and prices: pure functions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduler_svc.cost_model import CostModel, causal_pairs
from scheduler_svc.limits import Limits
from scheduler_svc.request import Branch, Request

MAX_PREEMPTIONS_UNRESERVED = 2
"""After this many preemptions a branch re-enters only with its worst case reserved."""


class PreemptionMode(enum.Enum):
    """What becomes of a victim's KV."""

    AUTO = "auto"  # the cheaper of the two
    RECOMPUTE = "recompute"
    SWAP = "swap"  # as far as the host pool has room


@dataclass(frozen=True, slots=True)
class Policy:
    """How the scheduler serves. The last two fields are other systems' ways, for comparison."""

    preemption: PreemptionMode = PreemptionMode.AUTO
    is_caching: bool = True  # False: no prefix cache
    # Tokens whose blocks a branch gets at admission and keeps to its end; None: as it grows.
    reserve_tokens: Callable[[Request], int] | None = None
    is_static: bool = False  # admit only when nothing runs


def needs_reservation(branch: Branch) -> bool:
    """Whether admission must promise the branch room for its longest output."""
    return branch.num_preemptions >= MAX_PREEMPTIONS_UNRESERVED


def pick_victim(running: Iterable[Branch], for_branch: Branch) -> Branch | None:
    """Who gives up blocks so that `for_branch` can grow; None if nobody may.

    Only branches of requests that first entered later are asked, so the oldest one running is
    never a victim: that is the proof of progress. The youngest goes first, except that branches
    admitted with a reservation go last, so that few are preempted a third time. Lanes of one beam
    search do not take from each other.
    """
    age = for_branch.age
    younger = [b for b in running if b.age > age and not _is_same_beam(b, for_branch)]
    return max(younger, key=lambda b: (not needs_reservation(b), b.age), default=None)


def _is_same_beam(branch: Branch, other: Branch) -> bool:
    return branch.request is other.request and branch.request.beam is not None


def should_swap(
    mode: PreemptionMode, cost: CostModel, limits: Limits, num_blocks: int, num_tokens_before: int
) -> bool:
    """Whether moving full blocks out and in again beats computing them again.

    Args:
        mode: AUTO decides by price.
        cost: prices; without one of swapping nothing is swapped.
        limits: sizes of a block, and of the chunks in which tokens would be computed.
        num_blocks: to move, at least 1, at the end of a sequence.
        num_tokens_before: of the sequence; computing the others reads their KV.
    """
    if mode is not PreemptionMode.AUTO:
        return mode is PreemptionMode.SWAP
    if not cost.swap_bytes_per_s:
        return False
    swap_ns = 2 * num_blocks * limits.block_bytes / cost.swap_bytes_per_s * 1e9
    return swap_ns < _recompute_ns(cost, limits, num_blocks, num_tokens_before)


def _recompute_ns(
    cost: CostModel, limits: Limits, num_blocks: int, num_tokens_before: int
) -> float:
    """Time of computing the blocks' tokens in chunks beside other rows, without fixed costs."""
    num_tokens = num_blocks * limits.block_size
    total_ns = num_tokens * cost.token_ns
    total_ns += causal_pairs(num_tokens, num_tokens_before) * cost.pair_ns
    if cost.kv_bytes_per_s:
        num_chunks = -(-num_tokens // limits.max_num_batched_tokens)
        mean_context = num_tokens_before + num_tokens * (num_chunks + 1) / (2 * num_chunks)
        read_bytes = num_chunks * mean_context * limits.block_bytes / limits.block_size
        total_ns += read_bytes / cost.kv_bytes_per_s * 1e9
    return total_ns

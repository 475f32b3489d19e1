"""What a simulation needs beside its requests, put together from plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blockyard.simulate.device import DeviceProfile
from blockyard.simulate.policies import make_policy
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy, PreemptionMode

PREEMPTION_NAMES: Final = tuple(mode.value for mode in PreemptionMode)

_VOCAB_SIZE: Final = 128_256
_MAX_BLOCKS: Final = 1 << 28
"""More than any device or host has; their books take some 30 bytes a block."""


class SetupError(Exception):
    """Sizes that contradict each other; the message says which."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the pools and of a step. Blocks are usable ones: the padding block comes on top."""

    num_blocks: int
    block_size: int = 16  # [tokens]
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    num_host_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything but the requests."""

    limits: Limits
    policy: Policy
    profile: DeviceProfile
    window: int = 2  # plans in flight, 1 to 3


def make_setup(
    policy_name: str,
    sizes: Sizes,
    profile: DeviceProfile,
    preemption: str = PreemptionMode.AUTO.value,
    window: int = 2,
) -> Setup:
    """The setup of one of POLICY_NAMES, with one of PREEMPTION_NAMES.

    Raises:
        SetupError: a pool that holds no request or is absurdly large, or more rows than a step has
            tokens.
    """
    if sizes.num_blocks < 1:
        raise SetupError(f"{sizes.num_blocks} blocks hold no request")
    if (largest := max(sizes.num_blocks, sizes.num_host_blocks)) > _MAX_BLOCKS:
        raise SetupError(f"{largest:,} blocks in a pool, at most {_MAX_BLOCKS:,}")
    try:
        limits = Limits(
            num_device_blocks=sizes.num_blocks + 1,
            block_size=sizes.block_size,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            vocab_size=_VOCAB_SIZE,
            num_host_blocks=sizes.num_host_blocks,
            block_bytes=sizes.block_size * profile.kv_bytes_per_token,
        )
    except ValueError as error:
        raise SetupError(str(error)) from error
    # The last token of the longest sequence needs no slot.
    max_slots = limits.max_total_tokens - 1
    policy = make_policy(policy_name, max_slots, PreemptionMode(preemption))
    return Setup(limits, policy, profile, window)


def blocks_in(kv_gib: float, block_size: int, profile: DeviceProfile) -> int:
    """Blocks of `block_size` tokens that so much memory holds [GiB]."""
    return int(kv_gib * 2**30 // (block_size * profile.kv_bytes_per_token))

"""Small simulations for the tests."""

from __future__ import annotations

import numpy as np

from blockyard.simulate.device import DeviceProfile
from blockyard.simulate.setup import Setup, Sizes, make_setup
from blockyard.simulate.trace import NS_PER_S, Prefixes, Trace
from scheduler_svc.cost_model import CostModel

STEP_NS = 1_000_000
EQUAL_STEPS = DeviceProfile("equal steps", CostModel(step_ns=STEP_NS), kv_bytes_per_token=100)
"""Every step takes as long, whatever it does."""
GPU = DeviceProfile(
    "a GPU in small",
    CostModel(step_ns=1e6, token_ns=2e4, kv_bytes_per_s=1e12, swap_bytes_per_s=5e10),
    kv_bytes_per_token=100_000,
)


def setup(
    policy: str = "blockyard",
    *,
    num_blocks: int = 4000,
    profile: DeviceProfile = EQUAL_STEPS,
    preemption: str = "auto",
    window: int = 2,
    num_host_blocks: int = 0,
) -> Setup:
    """Blocks of 16 tokens, at most 32 rows and 2,048 tokens a request."""
    sizes = Sizes(
        num_blocks,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        max_model_len=2048,
        num_host_blocks=num_host_blocks,
    )
    return make_setup(policy, sizes, profile, preemption, window)


def requests(*lengths: tuple[int, int], arrivals_s: list[float] | None = None) -> Trace:
    """Requests of these (prompt, output) lengths; all arrive at once unless said."""
    prompts, outputs = np.array(lengths, np.int32).T
    arrivals = np.array(arrivals_s or [0] * len(lengths)) * NS_PER_S
    return Trace("a test", arrivals.astype(np.int64), prompts, outputs)


def ragged(count: int, seed: int, max_prompt: int = 900, max_output: int = 200) -> Trace:
    """Requests of random lengths, all at once."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(1, max_prompt, count), rng.integers(1, max_output, count)
    return requests(*zip(prompts.tolist(), outputs.tolist(), strict=True))


def conversation(num_turns: int) -> Trace:
    """One conversation, a turn every 10 s: each prompt has all blocks of the one before."""
    prompts = np.arange(500, 500 + 300 * num_turns, 300, dtype=np.int32)
    chains: list[np.ndarray] = []
    for num_tokens in prompts.tolist():
        known = chains[-1] if chains else np.array([0])
        # The last block of a prompt is partial, so it is another one in the next prompt.
        kept, fresh = known[:-1], 100 * (len(chains) + 1)
        missing = -(-num_tokens // 512) - len(kept)
        chains.append(np.concatenate([kept, fresh + np.arange(missing)]))
    starts = np.concatenate([[0], np.cumsum([len(chain) for chain in chains])])
    arrivals_ns = np.arange(num_turns) * 10 * NS_PER_S
    outputs = np.full(num_turns, 20, np.int32)
    prefixes = Prefixes(np.concatenate(chains), starts)
    return Trace("a conversation", arrivals_ns, prompts, outputs, prefixes)

"""How this system reserves KV memory, and how others do, as settings of the same scheduler.

The reserving ones get blocks from the same pool, so they have no external fragmentation: that
flatters them. Orca's three variants are those of Kwon et al., "Efficient memory management for
large language model serving with PagedAttention", SOSP 2023, section 6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Request

POLICY_NAMES: Final = ("blockyard", "orca-max", "orca-pow2", "orca-oracle", "static")


def make_policy(name: str, max_slots: int, preemption: PreemptionMode) -> Policy:
    """One of POLICY_NAMES, where the longest sequence needs `max_slots`.

    `preemption` matters to "blockyard" only: the others never grow, so they never preempt.
    """
    reserved: dict[str, Callable[[Request], int]] = {
        "orca-max": lambda _: max_slots,
        "orca-pow2": lambda request: min(_with_power_of_two(request), max_slots),
        "orca-oracle": _num_slots,
        "static": lambda _: max_slots,
    }
    if name == "blockyard":
        return Policy(preemption=preemption)
    return Policy(
        is_caching=False,
        reserve_tokens=reserved[name],
        is_static=name == "static",
    )


def _with_power_of_two(request: Request) -> int:
    """Room for the prompt and for the output's length, known, rounded up to a power of two."""
    num_output_tokens = request.max_total_tokens - request.num_prompt_tokens
    return request.num_prompt_tokens + (1 << (num_output_tokens - 1).bit_length())


def _num_slots(request: Request) -> int:
    """Exactly what the request will use: its last token needs no slot."""
    return request.max_total_tokens - 1

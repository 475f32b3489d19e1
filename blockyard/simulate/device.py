"""A device that computes nothing: it takes as long as a fitted cost model says."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pydantic

from scheduler_svc.cost_model import CostModel, causal_pairs
from scheduler_svc.step_plan import StepPlan, StepTokens

OUTPUT_TOKEN_ID: Final = 0
"""Of every token generated: lengths come from the trace, so nobody reads them."""


class ProfileError(Exception):
    """A device profile that cannot be used; the message says why."""


class _ProfileFile(pydantic.BaseModel):
    """The JSON object of a device profile: the fields of CostModel and those of DeviceProfile."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step_ns: float = pydantic.Field(ge=0)
    token_ns: float = pydantic.Field(gt=0)
    kv_bytes_per_s: float = pydantic.Field(gt=0)
    swap_bytes_per_s: float = pydantic.Field(default=0.0, ge=0)
    free_tokens: int = pydantic.Field(default=0, ge=0)
    pair_ns: float = pydantic.Field(default=0.0, ge=0)
    kv_bytes_per_token: int = pydantic.Field(gt=0)
    round_trip_ns: float = pydantic.Field(default=0.0, ge=0)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a model on a device costs.

    Attributes:
        name: of the device.
        cost: of its steps.
        kv_bytes_per_token: all layers, keys and values.
        round_trip_ns: from a plan to its result, less the step, if nothing hides it: that is, no
            step before it.
    """

    name: str
    cost: CostModel
    kv_bytes_per_token: int
    round_trip_ns: float = 0.0


PRESETS: Final = {
    "llama-8b-h100": DeviceProfile(
        "llama-8b-h100",
        # Fitted to measured times of one H100 80GB, bf16: all matrix products of a step of 1 to
        # 8,192 tokens (5.6 to 169 ms), KV read at 3.05 TB/s, pinned copies over PCIe 5 at 52 GB/s.
        # Decode steps of 1 to 256 rows come out within 14 % of those a tuned engine was measured
        # at. docs/simulation.md has the comparison.
        CostModel(step_ns=5.6e6, token_ns=19_500.0, kv_bytes_per_s=3.05e12, swap_bytes_per_s=52e9),
        kv_bytes_per_token=32 * 2 * 8 * 128 * 2,  # layers, K and V, KV heads, head_dim, bytes
    )
}
DEFAULT_PROFILE: Final = "llama-8b-h100"


def load_profile(name: str) -> DeviceProfile:
    """A preset by name, or the profile in a JSON file.

    Raises:
        ProfileError: no such preset or file, or a file that is not a profile.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        known = ", ".join(PRESETS)
        raise ProfileError(f"{name}: {reason}; presets are: {known}") from error
    try:
        fields = _ProfileFile(**json.loads(text)).model_dump()
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ProfileError(f"{name}: {place}: {problem['msg']}") from error
    except (ValueError, TypeError) as error:
        raise ProfileError(f"{name}: not a JSON object: {error}") from error
    others = {name: fields.pop(name) for name in ("kv_bytes_per_token", "round_trip_ns")}
    return DeviceProfile(Path(name).stem, CostModel(**fields), **others)


class SimulatedDevice:
    """Runs plans one after another, each for as long as the cost model predicts."""

    def __init__(self, profile: DeviceProfile, block_bytes: int) -> None:
        """A device that is idle at time 0 and moves blocks of `block_bytes`."""
        self._profile = profile
        self._block_bytes = block_bytes
        self._queue: deque[tuple[StepPlan, int]] = deque()  # plan, when it ends [ns]
        self._free_at_ns = 0
        self.busy_ns = 0
        self.num_tokens_in_flight = 0  # scheduled by the plans queued

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def next_end_ns(self) -> int | None:
        """When the oldest plan ends; None if there is none."""
        return self._queue[0][1] if self._queue else None

    @property
    def oldest_has_prefills(self) -> bool:
        """Whether the oldest plan, which must exist, computes more than decode rows."""
        plan = self._queue[0][0]
        return plan.num_decode_rows < len(plan.rows)

    def send(self, plan: StepPlan, contexts: npt.NDArray[np.int32], now_ns: int) -> None:
        """Queue a plan whose rows attend to so many tokens, their new ones included [num_rows]."""
        duration_ns = self._duration_ns(plan, contexts)
        reached_ns = now_ns + round(self._profile.round_trip_ns)
        self._free_at_ns = max(self._free_at_ns, reached_ns) + duration_ns
        self.busy_ns += duration_ns
        self.num_tokens_in_flight += plan.num_tokens
        self._queue.append((plan, self._free_at_ns))

    def _duration_ns(self, plan: StepPlan, contexts: npt.NDArray[np.int32]) -> int:
        num_swapped = len(plan.moves.swap_out) + len(plan.moves.swap_in)
        if not len(plan.rows) and not num_swapped:
            return 0  # it only frees rows
        prefills = zip(
            plan.num_scheduled_tokens, contexts[plan.num_decode_rows :].tolist(), strict=True
        )
        duration_ns = self._profile.cost.step_time_ns(
            plan.num_tokens,
            int(contexts.sum()) * self._profile.kv_bytes_per_token,
            num_swapped * self._block_bytes,
            sum(causal_pairs(num_new, context - num_new) for num_new, context in prefills),
        )
        return max(1, round(duration_ns))

    def take_result(self) -> StepTokens:
        """The result of the oldest plan, which must have ended."""
        plan, _ = self._queue.popleft()
        self.num_tokens_in_flight -= plan.num_tokens
        token_ids = np.full(len(plan.sampling_rows), OUTPUT_TOKEN_ID, np.int32)
        return StepTokens(plan.epoch, plan.step_id, token_ids)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from blockyard.simulate.device import (
    PRESETS,
    DeviceProfile,
    ProfileError,
    SimulatedDevice,
    load_profile,
)
from scheduler_svc.cost_model import CostModel
from scheduler_svc.step_plan import Moves, StepPlan

FIELDS = {
    "step_ns": 1e6,
    "token_ns": 1000,
    "kv_bytes_per_s": 1e9,
    "swap_bytes_per_s": 1e9,
    "kv_bytes_per_token": 100,
}
BLOCK_BYTES = 1600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ns": 0}, "token_ns: Input should be greater than 0"),
        ({"token_ns": "fast"}, "token_ns"),
        ({"kv_bytes_per_token": 1.5}, "kv_bytes_per_token"),
        ({"step_ns": -1}, "step_ns"),
        ({"step_ns": float("nan")}, "step_ns"),
        ({"flops": 1}, "flops: Extra inputs"),
    ],
)
def test_bad_profiles(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**FIELDS, **changes}))
    with pytest.raises(ProfileError, match=message):
        load_profile(str(path))


@pytest.mark.parametrize("text", ["", "[]", "3", "{"])
def test_what_is_no_profile_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"mine\.json: not a JSON object"):
        load_profile(str(path))


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ProfileError, match="llama-8b-h100"):
        load_profile("llama-900b")


def test_a_profile_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    more = {"pair_ns": 2.5, "free_tokens": 64, "round_trip_ns": 7.0}
    path.write_text(json.dumps(FIELDS | more))
    profile = load_profile(str(path))
    assert (profile.name, profile.kv_bytes_per_token) == ("mine", 100)
    assert profile.cost == CostModel(1e6, 1000, 1e9, 1e9, free_tokens=64, pair_ns=2.5)
    assert profile.round_trip_ns == 7.0


@pytest.mark.parametrize(
    ("num_rows", "measured_ms"), [(1, 6.55), (8, 7.07), (32, 8.60), (64, 10.30), (128, 14.11)]
)
def test_the_preset_is_near_measured_decode_steps(num_rows: int, measured_ms: float) -> None:
    profile = PRESETS["llama-8b-h100"]
    context_bytes = num_rows * (1024 + 128) * profile.kv_bytes_per_token
    assert profile.cost.step_time_ns(num_rows, context_bytes, 0) / 1e6 == pytest.approx(
        measured_ms, rel=0.14
    )


def device(tmp_path: Path) -> SimulatedDevice:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FIELDS))
    return SimulatedDevice(load_profile(str(path)), BLOCK_BYTES)


def plan(step_id: int, num_rows: int = 2, **fields: Any) -> StepPlan:
    rows = np.arange(num_rows)
    return StepPlan(1, step_id, rows=rows, sampling_rows=rows, num_decode_rows=num_rows, **fields)


def contexts(*num_tokens: int) -> npt.NDArray[np.int32]:
    return np.array(num_tokens, np.int32)


def test_plans_run_one_after_another(tmp_path: Path) -> None:
    gpu = device(tmp_path)
    assert not len(gpu)
    gpu.send(plan(1), contexts(600, 400), now_ns=5)
    first_end_ns = 5 + 1_000_000 + 2 * 1000 + 1000 * 100
    assert gpu.next_end_ns == first_end_ns
    gpu.send(plan(2), contexts(0, 0), now_ns=7)
    assert gpu.take_result().step_id == 1
    assert gpu.next_end_ns == first_end_ns + 1_002_000
    assert gpu.take_result().token_ids.shape == (2,)
    gpu.send(plan(3), contexts(0, 0), now_ns=10**9)
    assert gpu.next_end_ns == 10**9 + 1_002_000
    assert gpu.busy_ns == 3 * 1_002_000 + 100_000


def test_moves_take_time_and_freeing_rows_does_not(tmp_path: Path) -> None:
    gpu = device(tmp_path)
    moves = Moves(swap_out=[(1, 1)], swap_in=[(2, 2), (3, 3)])
    gpu.send(plan(1, moves=moves), contexts(0, 0), now_ns=0)
    assert gpu.next_end_ns == 1_002_000 + 3 * BLOCK_BYTES
    gpu.take_result()
    gpu.send(plan(2, num_rows=0, freed_rows=[1]), contexts(), now_ns=10**9)
    assert gpu.next_end_ns == 10**9


def test_prefills_are_charged_for_their_pairs() -> None:
    """3 new tokens behind 5 attend to 6 + 7 + 8; a decode row reads its context and no more."""
    gpu = SimulatedDevice(DeviceProfile("dear", CostModel(pair_ns=100.0), 1), BLOCK_BYTES)
    rows = np.arange(2)
    both = StepPlan(1, 1, rows=rows, num_decode_rows=1, num_scheduled_tokens=[3])
    gpu.send(both, contexts(1000, 8), now_ns=0)
    assert gpu.next_end_ns == 2100


def test_a_round_trip_is_hidden_behind_the_step_before() -> None:
    cost = CostModel(step_ns=1000.0)
    gpu = SimulatedDevice(DeviceProfile("far", cost, 1, round_trip_ns=300.0), BLOCK_BYTES)
    gpu.send(plan(1), contexts(0, 0), now_ns=0)
    assert gpu.next_end_ns == 1300
    gpu.send(plan(2), contexts(0, 0), now_ns=10)
    gpu.take_result()
    assert gpu.next_end_ns == 2300


def test_no_step_is_over_at_once() -> None:
    gpu = SimulatedDevice(DeviceProfile("fast", CostModel(token_ns=0.01), 1), BLOCK_BYTES)
    gpu.send(plan(1), contexts(0, 0), now_ns=5)
    assert gpu.next_end_ns == 6

"""The real model's executor is killed and frozen under streams; the supervisor replaces it."""

from __future__ import annotations

import pytest

from benchmarks.recovery import compare, targets
from blockyard.models import store

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

NUM_KILLS = 2


async def test_streams_survive_kill_and_freeze() -> None:
    model_path = store.resolve(store.DEFAULT_MODEL, is_quiet=True)
    outcome, disturbance = await compare(model_path, 4, 112, NUM_KILLS, longest_undisturbed_s=0.35)
    assert outcome.num_prompts == 4
    assert len(disturbance.pauses_s) == NUM_KILLS + 1
    assert not [t for t in targets(outcome, disturbance, NUM_KILLS) if not t.is_met]

"""Malformed requests and connections: every answer is a typed status, and nobody is harmed.

`python -m benchmarks.hostile_input` sends 100,000.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from integration_tests.hostile import attack, target


@pytest.mark.timeout(90)
async def test_malformed_input_gets_a_typed_answer_and_harms_nobody(tmp_path: Path) -> None:
    async with target(tmp_path) as where:
        outcome = await attack(where, 3000, 300, 10, seed=1)
        assert not outcome.untyped, outcome.untyped[:5]
        assert outcome.num_sent == 3310
        statuses = {status for _, status, _ in outcome.requests}
        assert {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"} <= statuses
        assert {"closed", "still open"} <= {ending for _, ending in outcome.connections}
        await where.check_unharmed()

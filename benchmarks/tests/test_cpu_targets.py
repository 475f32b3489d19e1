"""The verdicts of bench_cpu, without running it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bench_cpu import Arrival, Results, step_shares


class _Steps(Results):
    def step_times_s(self) -> dict[int, float]:
        return {1: 0.02, 8: 0.04}


def test_steps_are_compared_where_both_were_measured() -> None:
    bounds = [{"rows": rows, "plain_ms": 30.0, "packed_ms": 10.0} for rows in (1, 8, 32)]
    results = _Steps({}, Arrival(0.0, 0.0, 0.0, 0.0), bounds, {}, 0.0)
    assert step_shares(results) == {1: (1.5, 0.5), 8: (0.75, 0.25)}
    assert step_shares(replace(results, gemm_bounds=[])) == {}

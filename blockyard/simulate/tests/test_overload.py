from __future__ import annotations

import numpy as np
import pytest

from blockyard.simulate.device import PRESETS
from blockyard.simulate.generator import generate
from blockyard.simulate.overload import Demand, serve
from blockyard.simulate.run import simulate
from blockyard.simulate.setup import Sizes, blocks_in, make_setup
from blockyard.simulate.trace import NS_PER_S
from scheduler_svc.engine.queue_bound import QueueBound

PROFILE = PRESETS["llama-8b-h100"]
SETUP = make_setup("blockyard", Sizes(blocks_in(55, 16, PROFILE)), PROFILE)
TRACE = generate("azure", 3000, 1).fitting(SETUP.limits.max_total_tokens)
PATIENCE_NS = {
    "10, 20 or 40 s": np.random.default_rng(2).choice([10, 20, 40], len(TRACE)) * NS_PER_S,
    "20 s": np.full(len(TRACE), 20 * NS_PER_S),
    "2 s + 60 ms a token": 2 * NS_PER_S + 60_000_000 * TRACE.num_output_tokens.astype(np.int64),
}
BOUND = QueueBound(max_waiting=300, max_waiting_tokens=10**9)


@pytest.fixture(scope="module")
def capacity() -> float:
    """Requests per second, if all wait from the start."""
    return len(TRACE) / (simulate(TRACE.all_at_once(), SETUP).end_ns / NS_PER_S)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("patience", PATIENCE_NS)
@pytest.mark.parametrize("load", [1.5, 2.0])
def test_nine_tenths_of_capacity_are_done_in_time(
    load: float, patience: str, capacity: float
) -> None:
    trace, patience_ns = TRACE.at_rate(load * capacity), PATIENCE_NS[patience]
    ours, fcfs = (serve(Demand(trace, patience_ns, BOUND, tells), SETUP) for tells in (True, False))
    for result in (ours, fcfs):
        num_others = result.num_cancelled_waiting + result.num_cancelled_running
        num_others += result.num_refused + result.num_dropped
        assert result.num_in_time + num_others == len(trace)
    assert ours.goodput >= 0.9 * capacity
    assert ours.goodput >= 1.15 * fcfs.goodput
    assert ours.token_goodput >= fcfs.token_goodput
    assert fcfs.num_dropped == 0


def test_below_capacity_everybody_is_served_in_time(capacity: float) -> None:
    trace = TRACE.take(500).at_rate(0.5 * capacity)
    result = serve(Demand(trace, PATIENCE_NS["20 s"][:500] * 3, BOUND), SETUP)
    assert result.num_in_time == len(trace)

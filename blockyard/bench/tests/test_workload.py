from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockyard.bench.workload import WorkloadError, WorkloadSpec, make_workload
from blockyard.simulate.trace import TraceError

ROWS = [(0.0, 9000, 10), (10.0, 100, 20), (11.0, 200, 30), (13.0, 300, 40)]


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    path = tmp_path / "four.csv"
    lines = ["arrival_s,prompt_tokens,output_tokens", *(",".join(map(str, row)) for row in ROWS)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("spec", "count", "prompt", "output", "samples", "temperature"),
    [
        (WorkloadSpec("W2"), 1024, 128, 512, 1, 0.0),
        (WorkloadSpec("W2", num_requests=5, temperature=0.5), 5, 128, 512, 1, 0.5),
        (WorkloadSpec("L", batch=8), 8, 1024, 257, 1, 0.0),
        (WorkloadSpec("N4"), 128, 512, 256, 4, 1.0),
        (WorkloadSpec("N4", temperature=0.0), 128, 512, 256, 4, 0.0),
    ],
)
def test_equal_requests(
    spec: WorkloadSpec, count: int, prompt: int, output: int, samples: int, temperature: float
) -> None:
    workload = make_workload(spec)
    assert len(workload.trace) == count
    assert set(workload.trace.num_prompt_tokens) == {prompt}
    assert set(workload.trace.num_output_tokens) == {output}
    assert not workload.trace.arrival_ns.any()
    assert (workload.num_samples, workload.temperature) == (samples, temperature)


def test_w1_takes_the_first_rows_that_are_not_too_long(trace_path: Path) -> None:
    workload = make_workload(WorkloadSpec("W1", trace_path, num_requests=2))
    assert workload.trace.num_prompt_tokens.tolist() == [100, 200]
    assert not workload.trace.arrival_ns.any()
    assert workload.source == "four.csv"


def test_w1_of_generated_requests() -> None:
    workload = make_workload(WorkloadSpec("W1", seed=3))
    assert len(workload.trace) == 1000
    assert workload.trace.num_total_tokens.max() <= 8192
    assert workload.trace.num_prompt_tokens.mean() == pytest.approx(1155, rel=0.05)
    assert "generated" in workload.source


def test_a_begins_at_the_second_row_and_has_the_rate(trace_path: Path) -> None:
    workload = make_workload(WorkloadSpec("A", trace_path, rate=0.5, num_requests=3))
    assert workload.name == "A(0.5)"
    assert workload.trace.num_prompt_tokens.tolist() == [100, 200, 300]
    assert (workload.trace.arrival_ns / 1e9).tolist() == pytest.approx([0, 4 / 3, 4])


@pytest.mark.parametrize("rate", [4.0, 16.0])
def test_a_lasts_40_s(rate: float) -> None:
    trace = make_workload(WorkloadSpec("A", rate=rate)).trace
    assert len(trace) == 40 * rate
    assert trace.arrival_ns[-1] / 1e9 == pytest.approx(40, rel=0.01)


def test_a_trace_as_it_is(trace_path: Path) -> None:
    workload = make_workload(WorkloadSpec("trace", trace_path))
    assert (workload.trace.arrival_ns / 1e9).tolist() == [0, 10, 11, 13]
    assert len(workload.fitting(240).trace) == 2


def test_poisson_arrivals() -> None:
    spec = WorkloadSpec("W2", arrivals="poisson", rate=10.0)
    trace = make_workload(spec).trace
    gaps_s = np.diff(trace.arrival_ns) / 1e9
    assert trace.arrival_ns[0] == 0
    assert gaps_s.mean() == pytest.approx(0.1, rel=0.1)
    assert gaps_s.std() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (WorkloadSpec("W9"), "unknown workload 'W9'; it is one of W1, W2"),
        (WorkloadSpec("L"), "--batch"),
        (WorkloadSpec("W1", batch=3), "--batch"),
        (WorkloadSpec("A"), "needs --rate"),
        (WorkloadSpec("W2", trace_path=Path("x")), "needs no --trace"),
        (WorkloadSpec("W2", arrivals="trace"), "no arrival times"),
        (WorkloadSpec("L", batch=2, arrivals="poisson", rate=1.0), "all at once"),
        (WorkloadSpec("L", batch=2, num_requests=3), "--batch many"),
        (WorkloadSpec("W1", arrivals="poisson"), "poisson needs --rate"),
        (WorkloadSpec("W1", rate=3.0), "--rate goes with"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: WorkloadSpec, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make_workload(spec)


def test_a_bad_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,prompt_tokens\n0,1\n")
    with pytest.raises(TraceError, match=r"bad\.csv:1: no column output_tokens"):
        make_workload(WorkloadSpec("W1", path))

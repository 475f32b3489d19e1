from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.report import Target


@pytest.mark.parametrize(
    ("value", "comparison", "limit", "is_met"),
    [
        (1.0, "<=", 1.0, True),
        (1.1, "<=", 1.0, False),
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (math.nan, "<=", 1.0, False),
        (math.nan, ">=", 1.0, False),
    ],
)
def test_target(value: float, comparison: str, limit: float, is_met: bool) -> None:
    assert Target("t", value, comparison, limit).is_met is is_met  # type: ignore[arg-type]  # str


def test_percentiles_are_scaled() -> None:
    found = report.percentiles(np.arange(101) * 1000, 1000)
    assert found == {"p50": 50, "p95": 95, "p99": 99, "max": 100, "mean": 50, "count": 101}


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        report.percentiles([])


def test_what_is_no_number_is_null() -> None:
    document = report.document("none", {"a": [1.5, math.nan]}, [Target("t", math.inf, "<=", 1)])
    assert document["results"] == {"a": [1.5, None]}
    assert document["targets"][0]["value"] is None
    json.dumps(document, allow_nan=False)


def test_written_results_say_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS_DIR", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = report.write("example", {"a": 1}, [Target("t", 2.0, "<=", 1.0, "us")])
    written = json.loads(path.read_text())
    assert written["results"] == {"a": 1}
    assert written["targets"][0]["is_met"] is False
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["python"].startswith("3.")
    assert written["command"]


def test_one_missed_target_fails_all(capsys: pytest.CaptureFixture[str]) -> None:
    met, missed = Target("met", 1, "<=", 2), Target("missed", 3, "<=", 2)
    assert report.print_targets([met])
    assert not report.print_targets([met, missed])
    assert "FAIL" in capsys.readouterr().out

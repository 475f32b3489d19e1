from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import simulate_cases
from benchmarks.simulate_cases import parser, start

AZURE = "arrival_s,prompt_tokens,output_tokens\n0.0,374,44\n4.3,396,109\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--azure", "/no/such/file"], "/no/such/file: No such file"),
        (["--plot"], "plots need matplotlib"),
        (["--mooncake", "x"], "unrecognized arguments"),
    ],
)
def test_a_study_that_cannot_run_exits_with_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["study", *arguments])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as caught:
        start(parser("A study.", "azure", can_plot=True))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_trace_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other = tmp_path / "usual.csv", tmp_path / "other.csv"
    other.write_text(AZURE)
    monkeypatch.setattr(simulate_cases, "_FILES", {"azure": usual})
    monkeypatch.setattr("sys.argv", ["study"])
    assert start(parser("A study.", "azure"))[1].name == "azure-like"
    usual.write_text(AZURE)
    assert start(parser("A study.", "azure"))[1].name == "usual"
    monkeypatch.setattr("sys.argv", ["study", "--azure", str(other)])
    assert start(parser("A study.", "azure"))[1].name == "other"

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockyard.cli.main import main
from blockyard.client.tests.scripted_server import ScriptedServer, scripted_server


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the `blockyard` command in this process, with an empty model store."""
    monkeypatch.setenv("BLOCKYARD_HOME", str(tmp_path / "home"))

    def run_command(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["blockyard", *arguments])
        exit_code = main()
        captured = capsys.readouterr()
        return Outcome(exit_code, captured.out, captured.err)

    return run_command


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running

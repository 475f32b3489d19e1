from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model store of the test's own."""
    path = tmp_path / "home"
    monkeypatch.setenv("BLOCKYARD_HOME", str(path))
    return path

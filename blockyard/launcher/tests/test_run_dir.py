"""Finding engines: only what is ours and answers."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from blockyard.launcher.run_dir import create_run_dir, running_engines, service_address


@pytest.fixture(autouse=True)
def temp_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for temporary files."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _listener(run_dir: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(service_address(run_dir, "engine").removeprefix("unix:"))
    listener.listen()
    return listener


def test_nothing_runs() -> None:
    assert running_engines() == []


def test_what_is_not_an_engine_is_passed_over(temp_dir: Path) -> None:
    create_run_dir()  # a server that is starting
    _listener(create_run_dir()).close()  # one that was killed
    (temp_dir / "blockyard-file").write_text("")
    (temp_dir / "blockyard-dangling").symlink_to("/no/such/place")
    folder = temp_dir / "blockyard-odd"
    folder.mkdir()
    (folder / "engine.sock").write_text("not a socket")
    assert running_engines() == []


def test_engines_that_answer_are_found() -> None:
    folders = sorted([create_run_dir(), create_run_dir()])
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
    with _listener(folders[0]), _listener(folders[1]):
        assert running_engines() == [service_address(folder, "engine") for folder in folders]


def test_what_others_left_there_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    with _listener(create_run_dir()):
        assert len(running_engines()) == 1
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert running_engines() == []

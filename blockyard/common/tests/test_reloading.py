"""Values of files: replaced when these change, kept when the change is a bad one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockyard.common.reloading import FileError, Reloading, read_bytes


def number_in(path: Path) -> Reloading[int]:
    def load() -> int:
        try:
            return int(read_bytes(path))
        except ValueError as error:
            raise FileError(f"{path}: no number") from error

    return Reloading([path], load)


def test_a_changed_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "n"
    path.write_text("1")
    number = number_in(path)
    assert [number.get(), number.get()] == [1, 1]
    assert not caplog.messages
    (tmp_path / "new").write_text("2")
    os.replace(tmp_path / "new", path)
    assert [number.get(), number.get()] == [2, 2]
    assert caplog.messages == ["read again"]


def test_a_bad_change_is_reported_once_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    number = number_in(path)
    path.write_text("nonsense")
    assert [number.get(), number.get()] == [1, 1]
    assert caplog.messages == [f"{path}: no number; what was read before stays in use"]
    path.unlink()
    assert [number.get(), number.get()] == [1, 1]
    assert "No such file" in caplog.messages[1]
    path.write_text("333")
    assert number.get() == 333


def test_a_file_that_is_bad_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        number_in(tmp_path / "missing")


def test_the_files_are_not_looked_at_too_often(tmp_path: Path) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    number = Reloading([path], lambda: int(read_bytes(path)), look_every_s=3600.0)
    path.write_text("22")
    assert number.get() == 1

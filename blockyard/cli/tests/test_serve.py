from __future__ import annotations

import os

import pytest

from blockyard.cli.serve import _json_line, _text_line


def test_lines_that_nobody_reads_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    unread = os.fdopen(write_fd, "w")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", unread)
        # Raising would end the relay of a child, which then stops when its pipe is full.
        _text_line("executor", "loading weights")
        _json_line("executor", "{}")
    with pytest.raises(BrokenPipeError):
        unread.close()

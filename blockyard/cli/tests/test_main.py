"""The entry point, where a command fails in more than one task."""

from __future__ import annotations

import os

import pytest

from blockyard.cli import main as entry


def failing_with(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[tuple[int, int]]:
    """Let the command raise these; returns what becomes of file descriptors."""
    duplicated: list[tuple[int, int]] = []

    def cli(**_: object) -> None:
        raise ExceptionGroup("workers", errors)

    monkeypatch.setattr(entry, "cli", cli)
    monkeypatch.setattr(os, "dup2", lambda source, target: duplicated.append((source, target)))
    return duplicated


def test_results_that_nobody_reads_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`blockyard generate --file ... | head` ends without a traceback."""
    duplicated = failing_with(monkeypatch, BrokenPipeError(), BrokenPipeError())
    assert entry.main() == 1
    assert [target for _, target in duplicated] == [1]


def test_other_failures_are_bugs_and_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    duplicated = failing_with(monkeypatch, BrokenPipeError(), ValueError("a bug"))
    with pytest.raises(ExceptionGroup):
        entry.main()
    assert not duplicated

from __future__ import annotations

from importlib import metadata

import pytest

from blockyard.common import version


def test_the_installed_version() -> None:
    assert version.software_version() == metadata.version("blockyard")


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version.software_version() == version.UNINSTALLED

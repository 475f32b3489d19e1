"""Which release of the software this is."""

from __future__ import annotations

from importlib import metadata
from typing import Final

UNINSTALLED: Final = "0+uninstalled"


def software_version() -> str:
    """Of the installed package; UNINSTALLED if this runs from a checkout that is not installed."""
    try:
        return metadata.version("blockyard")
    except metadata.PackageNotFoundError:
        return UNINSTALLED

"""Where a local server keeps its sockets, and how others of the same user find it there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Final

from blockyard.common.listen_address import is_answered

_PREFIX: Final = "blockyard-"


def create_run_dir() -> Path:
    """Make a directory that only this user can enter (mode 0700)."""
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def service_address(run_dir: Path, service: str) -> str:
    """The internal address of a service: unix:/path."""
    return f"unix:{_socket_path(run_dir, service)}"


def running_engines() -> list[str]:
    """Addresses of the engines that this user runs on this machine and that take connections."""
    found = []
    for run_dir in sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")):
        # One that ends meanwhile, or something else of that name, is not an engine.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # Anybody may leave a directory of that name in a shared place.
            is_ours = run_dir.lstat().st_uid == os.getuid()
            if is_ours and is_answered(_socket_path(run_dir, "engine")):
                found.append(service_address(run_dir, "engine"))
    return found


def _socket_path(run_dir: Path, service: str) -> Path:
    return run_dir / f"{service}.sock"

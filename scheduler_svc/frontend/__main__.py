"""`python -m scheduler_svc.frontend`: one front-end process.

Exit codes: 0 drained, 2 unusable settings, model directory or address.
"""

from __future__ import annotations

import sys

import uvloop

from blockyard.common import model_dir
from blockyard.common.listen_address import ListenError
from blockyard.common.reloading import FileError
from blockyard.common.settings import run_service
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.lifecycle import serve


def main(arguments: list[str]) -> int:
    """Run until drained; returns the exit code."""

    def run(settings: FrontendSettings) -> int:
        uvloop.run(serve(settings, model_dir.load(settings.model_dir)))
        return 0

    unusable = (model_dir.ModelDirError, ListenError, FileError)
    return run_service("frontend", FrontendSettings, arguments, run, unusable)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m scheduler_svc.frontend`: one front-end process.

Exit codes: 0 drained, 2 unusable settings, model directory or address.
"""

from __future__ import annotations

import logging
import sys

import pydantic
import uvloop

from blockyard.common import logs, model_dir
from blockyard.common.listen_address import ListenError
from blockyard.common.process import exit_with_parent
from scheduler_svc.frontend.config import load_settings
from scheduler_svc.frontend.lifecycle import serve

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Run until drained; returns the exit code."""
    logs.configure("frontend")
    try:
        settings = load_settings(arguments)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            field = ".".join(str(part) for part in problem["loc"])
            log.error("setting %s: %s", field, problem["msg"])
        return 2
    logs.configure("frontend", settings.log_format, settings.log_level)
    if settings.exit_with_parent:
        exit_with_parent()
    logs.event(log, "settings", **settings.model_dump())
    try:
        model = model_dir.load(settings.model_dir)
        uvloop.run(serve(settings, model))
    except (model_dir.ModelDirError, ListenError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

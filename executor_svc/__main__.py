"""`python -m executor_svc`: one executor process.

Exit codes: 0 stopped by a signal, 1 device lost, 2 unusable settings, model directory or address.
"""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NoReturn

import uvloop

from blockyard.common import logs, model_dir
from blockyard.common.listen_address import ListenError, claim
from blockyard.common.reloading import FileError
from blockyard.common.settings import run_service
from cupy_kernels.errors import KernelError
from executor_svc.config import ExecutorSettings
from executor_svc.kv_pool import KvPoolError
from executor_svc.loading import load_runner
from executor_svc.model.errors import ModelError
from executor_svc.runner import FatalDeviceError, Runner
from executor_svc.server import serve

_PROGRESS_STEP: Final = 0.25
DEVICE_LOST: Final = 1

log = logging.getLogger(__name__)


class _Progress:
    """Logs a line when a stage begins, and then each time it has come a good way further."""

    def __init__(self) -> None:
        self._stage = ""
        self._logged = 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        if stage == self._stage and fraction < min(self._logged + _PROGRESS_STEP, 1.0):
            return
        if stage == self._stage and self._logged >= 1.0:
            return
        self._stage, self._logged = stage, fraction
        logs.event(log, stage, percent=round(100 * fraction))


def _load(settings: ExecutorSettings) -> Runner:
    """Load in a thread that ends: OpenMP's idle workers go with it.

    Those of a thread that lives on count as competitors of the launching thread's, which then may
    not spin between two kernels: a step of one row took a third longer.
    """
    with ThreadPoolExecutor(1) as loader:
        return loader.submit(load_runner, settings, _Progress()).result()


def _serve(settings: ExecutorSettings) -> int:
    # Before the model is loaded, not after.
    claim(settings.listen)
    security = settings.link_security()
    try:
        runner = _load(settings)
        grace_s = settings.drain_grace_s
        uvloop.run(serve(runner, settings.listen, grace_s, security, settings.admin))
    except FatalDeviceError as error:
        log.error("device lost: %s", error)
        return DEVICE_LOST
    return 0


def main(arguments: list[str]) -> int:
    """Load the model and serve it until a signal; returns the exit code."""
    unusable = (
        *(model_dir.ModelDirError, ModelError, KernelError, KvPoolError),
        *(ListenError, FileError),
    )
    return run_service("executor", ExecutorSettings, arguments, _serve, unusable)


def leave(code: int) -> NoReturn:
    """End the process: at once if the device is lost, whose libraries fail while they clean up."""
    if code == DEVICE_LOST:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

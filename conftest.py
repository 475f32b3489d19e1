"""For all tests: what a service does to logging ends with its test, and the run ends."""

from __future__ import annotations

import faulthandler
import logging
import sys
from collections.abc import Iterator
from typing import Final

import pytest

_EXIT_S: Final = 60.0


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """Services run in this process log to a stream that pytest closes after the test."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    added = [handler for handler in root.handlers if handler not in before]
    for handler in added:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A gRPC server that a failed test left open can hold up the interpreter's exit for ever."""
    if hasattr(config, "workerinput"):
        return  # a process of pytest-xdist, which is ended by the one that started it
    faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=sys.__stderr__)

"""For all tests: what a service process does to logging ends with the test that started it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


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

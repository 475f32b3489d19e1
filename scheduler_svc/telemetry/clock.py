"""Spans have UNIX times, the services count on the monotonic clock."""

from __future__ import annotations

import time


def unix_offset_ns() -> int:
    """What to add to a monotonic time to get UNIX time [ns]."""
    return time.time_ns() - time.monotonic_ns()

"""torch's streams and events, whose constructors are untyped."""

from __future__ import annotations

from typing import Any, Final

import torch

_cuda: Final[Any] = torch.cuda


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own."""
    stream: torch.cuda.Stream = _cuda.Stream(device)
    return stream


def new_event(*, is_timed: bool = False, is_waited_for: bool = False) -> torch.cuda.Event:
    """An event; to wait for one that `is_waited_for` leaves the processor to others."""
    event: torch.cuda.Event = _cuda.Event(enable_timing=is_timed, blocking=is_waited_for)
    return event

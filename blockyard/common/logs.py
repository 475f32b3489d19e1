"""Structured logs: one line of `key=value` pairs (or JSON) per event.

The messages of unexpected exceptions are left out unless asked for: they may quote prompts.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, Literal


class _Formatter(logging.Formatter):
    def __init__(self, service: str, style: Literal["text", "json"], *, has_contents: bool) -> None:
        super().__init__()
        self._service = service
        self._json = style == "json"
        self._has_contents = has_contents

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        message = record.getMessage()
        if record.exc_info:
            fields = {**fields, "exception": self._exception(record)}
            if not self._has_contents:
                # asyncio goes on with the task that failed, and that with the exception.
                message = message.partition("\n")[0]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{stamp}.{int(record.msecs):03d}Z"
        if self._json:
            head = {"time": stamp, "level": record.levelname, "service": self._service}
            return json.dumps({**head, "message": message, **fields}, default=str)
        pairs = "".join(f" {key}={value}" for key, value in fields.items())
        return f"{stamp} {record.levelname[0]} {self._service}: {message}{pairs}"

    def _exception(self, record: logging.LogRecord) -> str:
        assert record.exc_info is not None
        error = record.exc_info[1]
        if self._has_contents or error is None:
            return self.formatException(record.exc_info)
        return "\n" + "".join(_without_messages(error, set())).rstrip()


def _without_messages(error: BaseException, seen: set[int]) -> Iterator[str]:
    """The traceback of an exception and of those that led to it, with their types alone."""
    seen.add(id(error))
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None and id(earlier) not in seen:
        yield from _without_messages(earlier, seen)
        yield "which led to:\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__}\n"
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield "which holds:\n"
            yield from _without_messages(inner, seen)


def configure(
    service: str,
    style: Literal["text", "json"] = "text",
    level: str = "INFO",
    *,
    has_contents: bool = False,
) -> None:
    """Send all logs of this process to stderr, in one format, named after `service`.

    Args:
        service: name in each line.
        style: pairs, or one JSON object a line.
        level: the least that is logged.
        has_contents: log the messages of unexpected exceptions too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(service, style, has_contents=has_contents))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def event(logger: logging.Logger, message: str, /, **fields: Any) -> None:
    """Log one INFO line with fields: `event(log, "finished", request="r1", tokens=12)`."""
    logger.info(message, extra={"fields": fields})

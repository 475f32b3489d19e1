"""Structured logs: one line of `key=value` pairs (or JSON) per event."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal


class _Formatter(logging.Formatter):
    def __init__(self, service: str, style: Literal["text", "json"]) -> None:
        super().__init__()
        self._service = service
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        message = record.getMessage()
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{stamp}.{int(record.msecs):03d}Z"
        if self._json:
            head = {"time": stamp, "level": record.levelname, "service": self._service}
            return json.dumps({**head, "message": message, **fields}, default=str)
        pairs = "".join(f" {key}={value}" for key, value in fields.items())
        return f"{stamp} {record.levelname[0]} {self._service}: {message}{pairs}"


def configure(service: str, style: Literal["text", "json"] = "text", level: str = "INFO") -> None:
    """Send all logs of this process to stderr, in one format, named after `service`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(service, style))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def event(logger: logging.Logger, message: str, /, **fields: Any) -> None:
    """Log one INFO line with fields: `event(log, "finished", request="r1", tokens=12)`."""
    logger.info(message, extra={"fields": fields})

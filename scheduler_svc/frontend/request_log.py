"""One log line per request, at its end. Never holds text of prompts or outputs."""

from __future__ import annotations

import logging
import time

from blockyard.common.logs import event
from scheduler_svc.frontend.output_stream import OutputStream

log = logging.getLogger(__name__)


class RequestRecord:
    """Filled in while the request is served."""

    def __init__(self) -> None:
        self._start_ns = time.monotonic_ns()
        self.request_id = ""
        self.num_prompt_tokens = 0
        self.seed = 0
        self.finish_reason = ""
        self.status = "OK"

    def write(self, stream: OutputStream | None) -> None:
        """Log the line; `stream` is None if the request was refused before it had one."""
        fields: dict[str, object] = {
            "request_id": self.request_id or "-",
            "status": self.status,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": stream.num_output_tokens if stream else 0,
        }
        if self.finish_reason:
            fields["finish_reason"] = self.finish_reason
        if stream is not None and stream.first_token_ns is not None:
            fields["ttft_ms"] = round((stream.first_token_ns - self._start_ns) / 1e6, 1)
        fields["duration_ms"] = round((time.monotonic_ns() - self._start_ns) / 1e6, 1)
        event(log, "request", **fields)

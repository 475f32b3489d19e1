"""One log line per request, at its end. Never holds text of prompts or outputs."""

from __future__ import annotations

import logging
import time

from blockyard.common.logs import event
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.access import CLIENT
from scheduler_svc.frontend.choice_output import Ending
from scheduler_svc.frontend.output_stream import OutputStream

log = logging.getLogger(__name__)


class RequestRecord:
    """Filled in while the request is served."""

    def __init__(self, method: str) -> None:
        """Begin with the call's arrival; `method` is e.g. Generate."""
        self.start_ns = time.monotonic_ns()
        self.method = method
        self.operation = "text_completion"  # as the GenAI conventions call it
        self.trace_id = b""  # of a sampled request, W3C [16]
        self.request_id = ""
        self.num_prompt_tokens = 0
        self.seed = 0
        self.status = "OK"
        self.reason = ""  # of an error
        self._finish_reasons: set[str] = set()

    @property
    def finish_reasons(self) -> list[str]:
        """Of the choices that ended, each once, e.g. STOP."""
        return sorted(self._finish_reasons)

    @property
    def error_type(self) -> str:
        """Why there was no complete answer; empty: there was."""
        return "" if self.status == "OK" else self.reason or self.status

    def note_ending(self, ending: Ending) -> None:
        """A choice ended so."""
        reason = pb.FinishReason.Name(ending.reason).removeprefix("FINISH_REASON_")
        self._finish_reasons.add(reason)

    def write(self, stream: OutputStream | None) -> None:
        """Log the line; `stream` is None if the request was refused before it had one."""
        fields: dict[str, object] = {
            "request_id": self.request_id or "-",
            "status": self.status,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": stream.num_output_tokens if stream else 0,
        }
        if client := CLIENT.get():
            fields["client"] = client
        if self.reason:
            fields["reason"] = self.reason
        if stream is not None and stream.num_choices > 1:
            fields["choices"] = stream.num_choices
        if self._finish_reasons:
            fields["finish_reason"] = ",".join(self.finish_reasons)
        if stream is not None and stream.first_token_ns is not None:
            fields["ttft_ms"] = round((stream.first_token_ns - self.start_ns) / 1e6, 1)
        fields["duration_ms"] = round((time.monotonic_ns() - self.start_ns) / 1e6, 1)
        event(log, "request", **fields)

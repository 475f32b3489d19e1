"""What the engine knows of one traced request, and its spans: queue, prefill, decode.

Times are taken while the request runs; spans are made in one go, at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
)

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.telemetry.clock import unix_offset_ns

MAX_CHUNKS: Final = 32
MAX_EVENTS: Final = 64
"""Kept of one request; of more only the number is told."""


class Tracers(NamedTuple):
    """Who makes spans: the engine, and in the name of the executor, which reports its times."""

    engine: Tracer
    executor: Tracer


@dataclass(slots=True, eq=False)
class StepRecord:
    """One step that somebody wants to know about. Times are monotonic [ns]."""

    epoch: int
    step_id: int
    began_ns: int  # planning
    sent_ns: int
    done_ns: int = 0  # its result was committed; 0: not yet
    result_ns: int = 0  # its result arrived
    timings: executor_pb2.StepTimings | None = None

    def write_executor_span(self, tracer: Tracer, parent: Context, offset_ns: int) -> None:
        """`executor.step`, as the executor measured it; ends when the result arrived here."""
        if (timings := self.timings) is None:
            return
        busy_ns = timings.apply_ns + timings.forward_ns + timings.sample_ns
        start_ns = max(self.sent_ns, self.result_ns - busy_ns)
        span = tracer.start_span(
            "executor.step",
            parent,
            attributes={
                "blockyard.epoch": self.epoch,
                "blockyard.step_id": self.step_id,
                "blockyard.step.queue_ns": timings.queue_ns,
                "blockyard.step.apply_ns": timings.apply_ns,
                "blockyard.step.forward_ns": timings.forward_ns,
                "blockyard.step.sample_ns": timings.sample_ns,
                "blockyard.step.idle_ns": timings.idle_ns,
            },
            start_time=start_ns + offset_ns,
        )
        span.end(self.result_ns + offset_ns)


class _Chunk(NamedTuple):
    """Part of a prompt that one step computed."""

    step: StepRecord
    num_tokens: int


class _Event(NamedTuple):
    ns: int
    name: str
    num_times: int  # or blocks


def parse_context(message: pb.TraceContext) -> SpanContext | None:
    """The span that the engine's spans go under; None if the message makes no sense."""
    if len(message.trace_id) != 16 or len(message.parent_span_id) != 8:
        return None
    context = SpanContext(
        int.from_bytes(message.trace_id, "big"),
        int.from_bytes(message.parent_span_id, "big"),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return context if context.is_valid else None


class RequestTrace:
    """One request that is traced."""

    def __init__(self, request: Request, parent: SpanContext, sent_unix_ns: int) -> None:
        """Begin when the request is queued; `sent_unix_ns` is when the front end sent it."""
        self.request = request
        self.context = parent
        self.first_token_ns = 0
        self.has_joined = False
        self._sent_unix_ns = sent_unix_ns
        self._chunks: list[_Chunk] = []
        self._num_chunks = 0
        self._events: list[_Event] = []
        self._num_events = 0
        self._seen = self._counts()

    def add_chunk(self, step: StepRecord, num_tokens: int) -> None:
        """A step computes so many tokens of its prompt, or of what it had, once more."""
        self._num_chunks += 1
        if len(self._chunks) < MAX_CHUNKS:
            self._chunks.append(_Chunk(step, num_tokens))

    def note_first_token(self, now_ns: int) -> None:
        """A step that yields a token for it was committed."""
        self.first_token_ns = self.first_token_ns or now_ns

    def note_changes(self, now_ns: int) -> None:
        """Make events of what its counters have counted since the last time."""
        counts = self._counts()
        if counts == self._seen:
            return
        for name, count in counts.items():
            if count > self._seen[name]:
                self.add_event(now_ns, name, count - self._seen[name])
        self._seen = counts

    def add_event(self, now_ns: int, name: str, count: int) -> None:
        """Something happened to it, `count` times or to so many blocks."""
        self._num_events += 1
        if len(self._events) < MAX_EVENTS:
            self._events.append(_Event(now_ns, name, count))

    def _counts(self) -> dict[str, int]:
        branches, blocks = self.request.branches, self.request.blocks
        return {
            "preempt": sum(branch.num_preemptions for branch in branches),
            "recovery": max(branch.num_recoveries for branch in branches),
            "swap_out": blocks.num_swapped_out,
            "swap_in": blocks.num_swapped_in,
            "copy_on_write": blocks.num_copied,
            "beam_prune": self.request.num_pruned_beams,
        }

    # ---- at its end

    def write(
        self, tracers: Tracers, status: RequestStatus, error_message: str, end_ns: int
    ) -> None:
        """Make its spans. Ones that it did not come to are not made."""
        self.note_changes(end_ns)
        offset_ns = unix_offset_ns()
        parent = trace.set_span_in_context(NonRecordingSpan(self.context), Context())
        request = self.request
        queued_ns = request.arrival_ns
        if self._sent_unix_ns:
            queued_ns = min(queued_ns, self._sent_unix_ns - offset_ns)
        phases = [("queue", queued_ns)]
        if request.first_admitted_ns:
            phases.append(("prefill", request.first_admitted_ns))
        if self.first_token_ns:
            phases.append(("decode", self.first_token_ns))
        spans = [
            tracers.engine.start_span(name, parent, start_time=begin_ns + offset_ns)
            for name, begin_ns in phases
        ]
        begins_ns = [begin_ns for _, begin_ns in phases]
        self._write_events(spans, begins_ns, offset_ns)
        if len(spans) > 1:
            spans[1].set_attribute("blockyard.num_prompt_tokens", request.num_prompt_tokens)
            spans[1].set_attribute("blockyard.num_cached_tokens", request.num_cached_tokens)
            spans[1].set_attribute("blockyard.num_chunks", self._num_chunks)
            self._write_chunks(tracers, spans, end_ns, offset_ns)
        last = spans[-1]
        last.set_attribute("blockyard.end", status.name.removeprefix("FINISHED_").lower())
        last.set_attributes(self._block_attributes(end_ns))
        if status is RequestStatus.FINISHED_ERROR:
            last.set_status(Status(StatusCode.ERROR, error_message))
        for span, until_ns in zip(spans, [*begins_ns[1:], end_ns], strict=True):
            span.end(until_ns + offset_ns)

    def _write_events(self, spans: list[Span], begins_ns: list[int], offset_ns: int) -> None:
        """Each to the span that it falls into."""
        for event in self._events:
            index = sum(begin_ns <= event.ns for begin_ns in begins_ns[1:])
            spans[index].add_event(
                event.name, {"blockyard.count": event.num_times}, event.ns + offset_ns
            )
        if self._num_events > len(self._events):
            spans[-1].set_attribute("blockyard.num_events", self._num_events)

    def _write_chunks(
        self, tracers: Tracers, spans: list[Span], end_ns: int, offset_ns: int
    ) -> None:
        """A span for each step that computed part of the prompt, and the executor's part of it.

        Those after the first token computed once more what a preemption or a recovery had lost.
        """
        for step, num_tokens in self._chunks:
            is_again = len(spans) > 2 and step.sent_ns >= self.first_token_ns
            parent = trace.set_span_in_context(spans[2 if is_again else 1], Context())
            span = tracers.engine.start_span(
                "prefill.chunk",
                parent,
                start_time=step.sent_ns + offset_ns,
                attributes={
                    "blockyard.step_id": step.step_id,
                    "blockyard.epoch": step.epoch,
                    "blockyard.num_tokens": num_tokens,
                },
            )
            inner = trace.set_span_in_context(span, Context())
            step.write_executor_span(tracers.executor, inner, offset_ns)
            span.end((step.done_ns or end_ns) + offset_ns)

    def _block_attributes(self, end_ns: int) -> dict[str, float]:
        blocks, admitted_ns = self.request.blocks, self.request.first_admitted_ns
        if not admitted_ns:
            return {}
        return {
            "blockyard.block_seconds": blocks.held_block_ns / 1e9,
            # On average, from its admission on.
            "blockyard.blocks.held": blocks.held_block_ns / max(1, end_ns - admitted_ns),
            "blockyard.blocks.shared": blocks.num_shared,
            "blockyard.blocks.copied": blocks.num_copied,
            "blockyard.blocks.swapped_out": blocks.num_swapped_out,
            "blockyard.blocks.swapped_in": blocks.num_swapped_in,
        }

"""Watches plans and results for what is traced: sampled steps, and sampled requests.

The scheduler knows nothing of it. A step that neither is sampled nor prefills a traced request
costs a look at the requests that are traced; nothing is made for a token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Status, StatusCode

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.engine.request_trace import RequestTrace, StepRecord, Tracers, parse_context
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.step_plan import Finished, StepPlan
from scheduler_svc.telemetry.clock import unix_offset_ns
from scheduler_svc.telemetry.export import TraceExport

ENGINE_SERVICE: Final = "blockyard-engine"
EXECUTOR_SERVICE: Final = "blockyard-executor"

_MAX_LINKS: Final = 64


@dataclass(slots=True, eq=False)
class _Watched:
    """A step under way that is sampled, or that prefills a traced request."""

    record: StepRecord
    sampled: _Sampled | None = None
    has_chunks: bool = False
    samples_first: list[RequestTrace] = field(default_factory=list)  # may get their first token


@dataclass(frozen=True, slots=True, eq=False)
class _Sampled:
    """What `engine.step` tells of a plan."""

    num_rows: int
    num_decode_rows: int
    num_tokens: int
    joined: list[RequestTrace] = field(default_factory=list)


class EngineTracing:
    """The traced requests, and the steps under way that matter to traces."""

    def __init__(self, tracers: Tracers, sample_ratio: float) -> None:
        """`sample_ratio`: of the steps; requests come sampled or not at all."""
        self._tracers = tracers
        self._sample_ratio = sample_ratio
        self._requests: dict[int, RequestTrace] = {}  # by request key
        self._rows: dict[int, RequestTrace] = {}
        self._steps: dict[int, _Watched] = {}  # of this epoch, by step id

    @classmethod
    def to(cls, export: TraceExport, sample_ratio: float) -> EngineTracing:
        """Make spans of engine and executor for this export."""
        tracers = Tracers(export.tracer(ENGINE_SERVICE), export.tracer(EXECUTOR_SERVICE))
        return cls(tracers, sample_ratio)

    # ---- requests

    def submitted(self, request: Request, context: pb.TraceContext) -> None:
        """A request was queued that its front end traces."""
        parent = parse_context(context)
        if parent is not None:
            self._requests[request.key] = RequestTrace(request, parent, context.sent_unix_ns)

    def ended(
        self,
        request: Request,
        status: RequestStatus = RequestStatus.FINISHED_ABORTED,
        error_message: str = "",
    ) -> None:
        """A request is over, for whatever reason."""
        traced = self._requests.pop(request.key, None)
        if traced is not None:
            traced.write(self._tracers, status, error_message, time.monotonic_ns())
            if not self._requests:
                self._rows.clear()

    # ---- steps

    def planned(self, plan: StepPlan, began_ns: int) -> None:
        """A plan was sent; planning began at `began_ns`."""
        is_sampled = random.random() < self._sample_ratio
        if not (is_sampled or self._requests):
            return
        now_ns = time.monotonic_ns()
        watched = _Watched(StepRecord(plan.epoch, plan.step_id, began_ns, now_ns))
        joined = self._follow_rows(plan, now_ns) if self._requests else []
        if self._rows and plan.num_scheduled_tokens:
            self._note_chunks(plan, watched)
        if is_sampled:
            watched.sampled = _Sampled(
                len(plan.rows), plan.num_decode_rows, plan.num_tokens, joined
            )
        if is_sampled or watched.samples_first or watched.has_chunks:
            self._steps[plan.step_id] = watched

    def _follow_rows(self, plan: StepPlan, now_ns: int) -> list[RequestTrace]:
        """Keep track of who is in which row; returns the requests that ran for the first time."""
        joined: list[RequestTrace] = []
        if not (plan.freed_rows or plan.new_rows or plan.forks or plan.moves):
            return joined
        for row in plan.freed_rows:
            self._rows.pop(row, None)
        for new in plan.new_rows:
            traced = self._requests.get(new.branch.request.key)
            if traced is None:
                continue
            self._rows[new.row] = traced
            if not traced.has_joined:
                traced.has_joined = True
                joined.append(traced)
            if new.logits_from is not None:
                traced.add_event(now_ns, "fork", 1)
        for source, _, _ in plan.forks:
            if (forked := self._rows.get(source)) is not None:
                forked.add_event(now_ns, "fork", 1)
        for traced in self._requests.values():
            traced.note_changes(now_ns)
        return joined

    def _note_chunks(self, plan: StepPlan, watched: _Watched) -> None:
        prefill_rows = plan.rows[plan.num_decode_rows :].tolist()
        for row, num_tokens in zip(prefill_rows, plan.num_scheduled_tokens, strict=True):
            traced = self._rows.get(row)
            if traced is None:
                continue
            watched.has_chunks = True
            traced.add_chunk(watched.record, num_tokens)
            if (plan.sampling_rows == row).any():
                watched.samples_first.append(traced)

    def committed(
        self,
        result: executor_pb2.StepResult,
        finished: Sequence[Finished],
        arrived_ns: int,
        committed_ns: int,
    ) -> None:
        """A result that arrived at `arrived_ns` was committed; `finished` ended with it."""
        watched = self._steps.pop(result.step_id, None)
        if watched is None:
            return
        record = watched.record
        record.result_ns, record.done_ns = arrived_ns, committed_ns
        record.timings = result.timings
        for traced in watched.samples_first:
            traced.note_first_token(record.done_ns)
        if watched.sampled is not None:
            keys = {each.request.key for each in finished if each.is_last} & self._requests.keys()
            left = [self._requests[key] for key in keys]
            self._write_step(record, watched.sampled, left)

    def epoch_ended(self) -> None:
        """The executor was lost: the steps under way have no result, and rows are empty."""
        now_ns = time.monotonic_ns()
        for watched in self._steps.values():
            watched.record.done_ns = now_ns
            if watched.sampled is not None:
                self._write_step(watched.record, watched.sampled, [])
        self._steps.clear()
        self._rows.clear()
        for traced in self._requests.values():
            traced.note_changes(now_ns)

    def _write_step(self, record: StepRecord, sampled: _Sampled, left: list[RequestTrace]) -> None:
        """`engine.step`, the root of a trace of its own, with `executor.step` under it."""
        links = [Link(traced.context, {"blockyard.link": "joined"}) for traced in sampled.joined]
        links += [Link(traced.context, {"blockyard.link": "left"}) for traced in left]
        offset_ns = unix_offset_ns()
        span = self._tracers.engine.start_span(
            "engine.step",
            Context(),
            attributes={
                "blockyard.epoch": record.epoch,
                "blockyard.step_id": record.step_id,
                "blockyard.num_rows": sampled.num_rows,
                "blockyard.num_decode_rows": sampled.num_decode_rows,
                "blockyard.num_tokens": sampled.num_tokens,
                "blockyard.step.plan_ns": record.sent_ns - record.began_ns,
            },
            links=links[:_MAX_LINKS],
            start_time=record.began_ns + offset_ns,
        )
        if record.timings is None:
            span.set_status(Status(StatusCode.ERROR, "the executor was lost"))
        else:
            span.set_attribute("blockyard.step.commit_ns", record.done_ns - record.result_ns)
            inner = trace.set_span_in_context(span, Context())
            record.write_executor_span(self._tracers.executor, inner, offset_ns)
        span.end(record.done_ns + offset_ns)

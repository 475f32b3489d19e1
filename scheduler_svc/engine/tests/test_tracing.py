from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.engine.request_trace import MAX_CHUNKS, MAX_EVENTS, parse_context
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.request import Request, RequestStatus
from scheduler_svc.step_plan import Finished, NewRow, StepPlan
from scheduler_svc.telemetry.export import TraceExport

TRACE_ID, PARENT_ID = bytes(range(1, 17)), bytes(range(1, 9))


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def tracing_into(spans: InMemorySpanExporter, ratio: float = 0.0) -> EngineTracing:
    return EngineTracing.to(TraceExport(SimpleSpanProcessor(spans)), ratio)


def context() -> pb.TraceContext:
    return pb.TraceContext(trace_id=TRACE_ID, parent_span_id=PARENT_ID)


def new_request(key: int = 1, **fields: Any) -> Request:
    prompt = np.arange(10, dtype=np.int32)
    return Request(key, 1, key, prompt, max_total_tokens=20, arrival_ns=1000, **fields)


def prefill(step_id: int, request: Request, num_tokens: int, *, samples: bool = False) -> StepPlan:
    """A plan that computes part of a prompt in row 3; the first also brings the row."""
    row = np.array([3], np.int64)
    branch = request.branches[0]
    new = NewRow(3, branch, 0, branch.token_ids, np.empty(0, np.int32))
    return StepPlan(
        1,
        step_id,
        new_rows=[new] if step_id == 1 else [],
        rows=row,
        num_scheduled_tokens=[num_tokens],
        sampling_rows=row if samples else row[:0],
    )


def decode(step_id: int) -> StepPlan:
    row = np.array([3], np.int64)
    return StepPlan(1, step_id, rows=row, num_decode_rows=1, same_batch=True, sampling_rows=row)


def result(step_id: int) -> executor_pb2.StepResult:
    timings = executor_pb2.StepTimings(apply_ns=1, forward_ns=20, sample_ns=3)
    return executor_pb2.StepResult(epoch=1, step_id=step_id, timings=timings)


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def run(tracing: EngineTracing, plan: StepPlan, *finished: Finished) -> None:
    """Plan and commit one step."""
    tracing.planned(plan, 5)
    tracing.committed(result(plan.step_id), finished, 10**18, 10**18 + 50)


def test_a_request_is_a_queue_a_prefill_and_a_decode(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans), new_request()
    tracing.submitted(request, context())
    request.first_admitted_ns = 2000
    run(tracing, prefill(1, request, 6))
    run(tracing, prefill(2, request, 4, samples=True))
    run(tracing, decode(3))
    assert not spans.get_finished_spans()
    tracing.ended(request, RequestStatus.FINISHED_STOP)
    found = by_name(spans)
    parent_id = int.from_bytes(PARENT_ID, "big")
    for name in ("queue", "prefill", "decode"):
        parent, own = found[name].parent, found[name].context
        assert parent is not None
        assert own is not None
        assert (parent.span_id, own.trace_id) == (parent_id, int.from_bytes(TRACE_ID, "big"))
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode"].start_time
    chunks = [span for span in spans.get_finished_spans() if span.name == "prefill.chunk"]
    assert [(c.attributes or {})["blockyard.num_tokens"] for c in chunks] == [6, 4]
    assert (found["decode"].attributes or {})["blockyard.end"] == "stop"
    steps = [span for span in spans.get_finished_spans() if span.name == "executor.step"]
    assert [step.resource.attributes["service.name"] for step in steps] == [
        "blockyard-executor"
    ] * 2
    assert [(step.end_time or 0) - (step.start_time or 0) for step in steps] == [24, 24]


def test_a_request_that_never_ran_has_only_a_queue(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans), new_request()
    tracing.submitted(request, context())
    tracing.ended(request)
    tracing.ended(request)  # once is enough
    assert [span.name for span in spans.get_finished_spans()] == ["queue"]
    assert (by_name(spans)["queue"].attributes or {})["blockyard.end"] == "aborted"


def test_a_failure_is_an_error(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans), new_request()
    tracing.submitted(request, context())
    tracing.ended(request, RequestStatus.FINISHED_ERROR, "its logits were not finite")
    status = by_name(spans)["queue"].status
    assert (status.is_ok, status.description) == (False, "its logits were not finite")


def test_what_happens_to_a_request_are_events(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans), new_request(num_samples=2)
    tracing.submitted(request, context())
    request.first_admitted_ns = 2000
    run(tracing, prefill(1, request, 10, samples=True))
    tracing.planned(StepPlan(1, 2, forks=[(3, 4, 0)]), 5)
    request.branches[0].num_preemptions += 1
    request.blocks.num_swapped_out += 7
    request.blocks.num_copied += 1
    request.num_pruned_beams += 2
    tracing.planned(StepPlan(1, 3, freed_rows=[3]), 5)
    request.branches[0].num_recoveries += 1
    tracing.epoch_ended()
    tracing.ended(request)
    events = [event for span in spans.get_finished_spans() for event in span.events]
    counts = {event.name: (event.attributes or {})["blockyard.count"] for event in events}
    assert counts == {
        "fork": 1,
        "preempt": 1,
        "swap_out": 7,
        "copy_on_write": 1,
        "recovery": 1,
        "beam_prune": 2,
    }


def test_what_is_kept_of_a_request_is_bounded(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans), new_request()
    tracing.submitted(request, context())
    request.first_admitted_ns = 2000
    run(tracing, prefill(1, request, 1))
    for step_id in range(2, 200):
        request.blocks.num_copied += 1
        plan = prefill(step_id, request, 1)
        plan.forks = [(3, 4, 0)]
        run(tracing, plan)
    tracing.ended(request)
    names = [span.name for span in spans.get_finished_spans()]
    assert names.count("prefill.chunk") == names.count("executor.step") == MAX_CHUNKS
    last = by_name(spans)["prefill"]
    assert len(last.events) == MAX_EVENTS
    attributes = last.attributes or {}
    assert (attributes["blockyard.num_chunks"], attributes["blockyard.num_events"]) == (199, 396)


def test_a_sampled_step_links_who_joined_and_who_left(spans: InMemorySpanExporter) -> None:
    tracing, request = tracing_into(spans, ratio=1.0), new_request()
    tracing.submitted(request, context())
    run(tracing, prefill(1, request, 10, samples=True))
    run(tracing, decode(2))
    finished = Finished(request, 0, RequestStatus.FINISHED_LENGTH, 2)
    run(tracing, decode(3), finished)
    steps = [span for span in spans.get_finished_spans() if span.name == "engine.step"]
    kinds = [[(link.attributes or {})["blockyard.link"] for link in step.links] for step in steps]
    assert kinds == [["joined"], [], ["left"]]
    assert all(step.parent is None for step in steps)
    assert [(step.attributes or {})["blockyard.step_id"] for step in steps] == [1, 2, 3]


def test_a_step_that_was_lost_is_an_error(spans: InMemorySpanExporter) -> None:
    tracing = tracing_into(spans, ratio=1.0)
    tracing.planned(decode(1), 5)
    tracing.epoch_ended()
    (step,) = spans.get_finished_spans()
    assert not step.status.is_ok
    run(tracing, decode(1))  # of the next epoch
    assert len(spans.get_finished_spans()) == 3


def test_nothing_is_kept_of_steps_that_nobody_asked_about(spans: InMemorySpanExporter) -> None:
    tracing, other = tracing_into(spans), new_request(2)
    run(tracing, prefill(1, other, 10))
    run(tracing, decode(2))
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    ("trace_id", "parent_id"),
    [(b"", b""), (TRACE_ID, b"x"), (bytes(16), PARENT_ID), (TRACE_ID, bytes(8)), (b"x", PARENT_ID)],
)
def test_a_malformed_context_is_ignored(
    trace_id: bytes, parent_id: bytes, spans: InMemorySpanExporter
) -> None:
    message = pb.TraceContext(trace_id=trace_id, parent_span_id=parent_id)
    assert parse_context(message) is None
    tracing, request = tracing_into(spans), new_request()
    tracing.submitted(request, message)
    tracing.ended(request)
    assert not spans.get_finished_spans()

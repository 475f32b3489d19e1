"""What a front end counts, and when it tells the engine."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from blockyard.engine.v1 import engine_pb2
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend import metrics as frontend_metrics
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.metrics import FrontendMetrics
from scheduler_svc.frontend.output_stream import OutputOptions, OutputStream
from scheduler_svc.frontend.request_log import RequestRecord
from scheduler_svc.frontend.tests.calls import expect_status, first_of, messages_of, until
from scheduler_svc.frontend.tests.conftest import Service, engine_state
from scheduler_svc.frontend.tests.fake_engine import finished
from scheduler_svc.telemetry.gen_ai import GenAiMetrics
from scheduler_svc.telemetry.loop_lag import LoopLag

REQUEST = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), skip_text=True)


def rpcs(report: engine_pb2.FrontendMetrics) -> dict[tuple[str, str, str], int]:
    return {(each.method, each.code, each.reason): each.count for each in report.rpcs}


def count(increase: engine_pb2.HistogramIncrease) -> int:
    return sum(increase.counts)


async def ended(service: Service, number: int) -> engine_pb2.FrontendMetrics:
    """What was counted, once so many calls have ended."""
    metrics = service.frontend._metrics
    await until(lambda: sum(metrics._rpcs.values()) == number)
    return metrics.take_report()


async def test_calls_count_by_how_they_ended(service: Service) -> None:
    streamed = service.stub.Generate(REQUEST)
    submit, _ = await service.engine.next_submit()
    await service.engine.send_tokens(submit.request_id, [50])
    await first_of(streamed)
    await service.engine.send_tokens(submit.request_id, [51, 52], finished("LENGTH"))
    await messages_of(streamed)
    unary = service.stub.GenerateUnary(REQUEST)
    submit, _ = await service.engine.next_submit()
    await service.engine.send_tokens(submit.request_id, [50], finished("LENGTH"))
    await unary
    refused = service.stub.GenerateUnary(pb.GenerateRequest())
    await expect_status(refused, grpc.StatusCode.INVALID_ARGUMENT, "must be set")
    cancelled = service.stub.Generate(REQUEST)
    submit, _ = await service.engine.next_submit()
    await service.engine.send_tokens(submit.request_id, [50])
    await first_of(cancelled)
    cancelled.cancel()
    report = await ended(service, 4)
    assert rpcs(report) == {
        ("Generate", "OK", ""): 1,
        ("GenerateUnary", "OK", ""): 1,
        ("GenerateUnary", "INVALID_ARGUMENT", "INVALID_FIELD"): 1,
        ("Generate", "CANCELLED", ""): 1,
    }
    # The cancelled one had its first token, and no end; one had only one token.
    assert count(report.time_to_first_token) == 3
    assert count(report.e2e_latency) == 2
    assert count(report.time_per_output_token) == 1
    assert 0 < report.time_per_output_token.sum < report.e2e_latency.sum
    assert (report.num_messages, report.num_tokens) == (3, 4)
    assert report.cpu_seconds > 0
    assert report.resident_bytes > 10 << 20


async def test_the_next_report_starts_at_nothing(service: Service) -> None:
    refused = service.stub.GenerateUnary(pb.GenerateRequest())
    await expect_status(refused, grpc.StatusCode.INVALID_ARGUMENT, "must be set")
    first = await ended(service, 1)
    second = service.frontend._metrics.take_report()
    assert rpcs(first)
    assert not rpcs(second)
    assert second.cpu_seconds < first.cpu_seconds


async def test_streams_under_way_are_a_gauge(service: Service) -> None:
    call = service.stub.Generate(REQUEST)
    await service.engine.next_submit()
    assert service.frontend._metrics.take_report().num_open_streams == 1
    call.cancel()
    assert (await ended(service, 1)).num_open_streams == 0


async def test_reports_are_sent_while_they_are_wanted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_metrics, "_REPORT_PERIOD_S", 0.01)
    reporting = asyncio.create_task(
        frontend_metrics.report_metrics(service.frontend._metrics, service.frontend._link)
    )
    await asyncio.sleep(0.1)
    assert service.engine.reports.empty()  # nobody asked
    service.engine.send_state(engine_state(wants_metrics=True))
    for _ in range(3):
        await asyncio.wait_for(service.engine.reports.get(), 5)
    reporting.cancel()


async def test_counts_wait_for_an_engine_that_was_lost(service: Service) -> None:
    service.engine.send_state(engine_state(wants_metrics=True))
    link = service.frontend._link
    await until(lambda: link.wants_metrics)
    call = service.stub.Generate(REQUEST)
    await service.engine.next_submit()
    service.engine.end_streams()
    await expect_status(messages_of(call), grpc.StatusCode.UNAVAILABLE, "lost")
    await until(lambda: link.wants_metrics)  # it came back
    link.report(service.frontend._metrics.take_report())
    report = await asyncio.wait_for(service.engine.reports.get(), 5)
    assert rpcs(report) == {("Generate", "UNAVAILABLE", "ENGINE_LOST"): 1}


async def test_a_front_end_that_leaves_reports_first(service: Service) -> None:
    service.engine.send_state(engine_state(wants_metrics=True))
    await until(lambda: service.frontend._link.wants_metrics)
    refused = service.stub.GenerateUnary(pb.GenerateRequest())
    await expect_status(refused, grpc.StatusCode.INVALID_ARGUMENT, "must be set")
    await service.frontend.drain()
    report = await asyncio.wait_for(service.engine.reports.get(), 5)
    assert rpcs(report) == {("GenerateUnary", "INVALID_ARGUMENT", "INVALID_FIELD"): 1}


class _Told(GenAiMetrics):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def ended(self, *values: object) -> None:
        self.calls.append(values)


def record(status: str = "OK", reason: str = "") -> RequestRecord:
    """A traced call that took 3 s."""
    made = RequestRecord("Generate")
    made.start_ns -= 3_000_000_000
    made.trace_id, made.operation = bytes(range(16)), "chat"
    made.status, made.reason = status, reason
    return made


async def test_traced_calls_are_exemplars_and_opentelemetry_hears_of_all() -> None:
    lag, told = LoopLag(), _Told()
    metrics = FrontendMetrics(Fanout(lag), lag, told)
    answered, stream = record(), OutputStream(1, OutputOptions(num_choices=1))
    stream.push(0, [1, 2, 3])
    stream.first_token_ns = answered.start_ns + 1_000_000_000
    metrics.ended(answered, stream)
    metrics.ended(record("RESOURCE_EXHAUSTED", "QUEUE_FULL"), None)
    metrics.ended(record("CANCELLED"), None)
    report = metrics.take_report()
    for increase, value in (
        (report.time_to_first_token, 1.0),
        (report.e2e_latency, 3.0),
        (report.time_per_output_token, 1.0),
    ):
        (exemplar,) = increase.exemplars
        assert exemplar.trace_id == bytes(range(16))
        assert exemplar.value == pytest.approx(value, abs=0.2)
        assert increase.counts[exemplar.bucket] == 1
    operations, errors, *times = zip(*told.calls, strict=True)
    assert operations == ("chat",) * 3
    assert errors == ("", "QUEUE_FULL", "CANCELLED")
    assert [column[1] is None for column in times] == [False, True, True]

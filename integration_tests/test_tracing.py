"""Traces of real processes, as a collector gets them; and service without a collector."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from blockyard.v1 import generate_pb2 as pb
from integration_tests.harness import Processes, until
from integration_tests.public_client import Answer, PublicClient
from integration_tests.trace_collector import Span, TraceCollector, covered_share
from integration_tests.traced_system import (
    CHUNKS,
    MAX_MODEL_LEN,
    NAN_SEED,
    PROMPT,
    TIMEOUT_S,
    traced_system,
)


class Traced:
    """A client whose requests have trace ids, and the collector."""

    def __init__(
        self, client: PublicClient, processes: Processes, collector: TraceCollector
    ) -> None:
        self.client, self.processes, self.collector = client, processes, collector

    def request(
        self,
        num_tokens: int,
        timeout_s: float | None = None,
        *,
        seed: int | None = None,
        **fields: Any,
    ) -> tuple[str, grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]]:
        """Begin a stream under a new trace; returns the trace's id."""
        trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
        metadata = (("traceparent", f"00-{trace_id}-{span_id}-01"),)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT),
            sampling=pb.SamplingParams(temperature=0.0, seed=seed),
            stop=pb.StopConditions(max_tokens=num_tokens, ignore_eos=True),
            **fields,
        )
        return trace_id, self.client.stub.Generate(request, timeout=timeout_s, metadata=metadata)

    async def spans(self, trace_id: str, *names: str) -> dict[str, Span]:
        """One span of each name, once all of them have come."""
        wanted = {"blockyard.v1.GenerateService/Generate", "llm_request", *names}
        of = self.collector.of
        await self.collector.until(lambda: wanted <= {span.name for span in of(trace_id)})
        return {span.name: span for span in of(trace_id)}

    async def status(self, trace_id: str, *names: str) -> tuple[str, bool]:
        """What the RPC's span says, which must be what `llm_request` says."""
        spans = await self.spans(trace_id, *names)
        rpc, request = spans["blockyard.v1.GenerateService/Generate"], spans["llm_request"]
        assert rpc.attributes["rpc.response.status_code"] == request.attributes["blockyard.status"]
        assert rpc.is_error == request.is_error
        return rpc.attributes["rpc.response.status_code"], rpc.is_error


@pytest_asyncio.fixture(scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    """Steps are traced too, one in two."""
    directory = tmp_path_factory.mktemp("traced")
    collector = TraceCollector(f"unix:{directory}/collector.sock")
    await collector.start()
    async with traced_system(directory, collector.address, "--trace-sample-ratio", 0.5) as (
        client,
        processes,
        _,
    ):
        yield Traced(client, processes, collector)
    await collector.stop()


async def test_one_trace_from_client_to_executor_covers_the_request(traced: Traced) -> None:
    trace_id, call = traced.request(40, request_id="r1")
    answer = Answer()
    await traced.client.follow(call, answer)
    assert answer.code is grpc.StatusCode.OK
    spans = await traced.spans(trace_id, "decode", "executor.step", "stream")
    rpc, request = spans["blockyard.v1.GenerateService/Generate"], spans["llm_request"]
    assert await traced.status(trace_id) == ("OK", False)
    assert request.parent_id == rpc.span_id
    assert request.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert request.attributes["gen_ai.usage.output_tokens"] == 40
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert request.attributes["gen_ai.request.id"] == "r1"
    assert request.attributes["blockyard.block_seconds"] > 0
    assert answer.usage is not None
    assert request.attributes["blockyard.blocks.shared"] == answer.usage.blocks_shared
    children = [spans[name] for name in ("tokenize", "queue", "prefill", "decode", "stream")]
    assert {child.parent_id for child in children} == {request.span_id}
    assert covered_share(rpc, children) >= 0.99
    services = {span.service.removeprefix("blockyard-") for span in traced.collector.of(trace_id)}
    assert services == {"frontend", "engine", "executor"}


async def test_a_prompt_has_a_span_for_each_chunk(traced: Traced) -> None:
    trace_id, call = traced.request(1, cache=pb.PrefixCache(off=True))
    await traced.client.follow(call, Answer())
    spans = await traced.spans(trace_id, "decode", "executor.step")
    chunks = [s for s in traced.collector.of(trace_id) if s.name == "prefill.chunk"]
    assert [c.attributes["blockyard.num_tokens"] for c in chunks] == list(CHUNKS)
    assert {chunk.parent_id for chunk in chunks} == {spans["prefill"].span_id}
    inner = [s for s in traced.collector.of(trace_id) if s.name == "executor.step"]
    assert [span.parent_id for span in inner] == [chunk.span_id for chunk in chunks]
    assert all(span.attributes["blockyard.step.forward_ns"] > 0 for span in inner)


async def test_ends_that_are_not_answers(traced: Traced) -> None:
    cancelled, call = traced.request(300)
    await call.read()
    call.cancel()
    assert await traced.status(cancelled, "decode") == ("CANCELLED", False)
    late, call = traced.request(300, timeout_s=0.3)
    answer = Answer()
    await traced.client.follow(call, answer)
    assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await traced.status(late, "decode") == ("DEADLINE_EXCEEDED", True)
    for trace_id in (cancelled, late):
        spans = await traced.spans(trace_id)
        assert spans["decode"].attributes["blockyard.end"] == "aborted"
        rpc = spans["blockyard.v1.GenerateService/Generate"]
        assert covered_share(rpc, traced.collector.of(trace_id)[1:]) >= 0.99


async def test_refusals(traced: Traced) -> None:
    invalid, call = traced.request(MAX_MODEL_LEN)
    answer = Answer()
    await traced.client.follow(call, answer)
    assert await traced.status(invalid) == ("INVALID_ARGUMENT", False)
    calls = dict(traced.request(100, cache=pb.PrefixCache(off=True)) for _ in range(20))
    answers = {trace_id: Answer() for trace_id in calls}
    await asyncio.gather(*(traced.client.follow(calls[t], answers[t]) for t in calls))
    codes = {trace_id: (await traced.status(trace_id))[0] for trace_id in calls}
    assert {t: a.code.name if a.code else "" for t, a in answers.items()} == codes
    assert {"OK", "RESOURCE_EXHAUSTED"} <= set(codes.values())
    # So many at once do not fit: some were preempted, and their traces say so.
    events = {e.name for t in calls for span in traced.collector.of(t) for e in span.events}
    assert {"preempt", "swap_out", "swap_in"} <= events


async def test_a_request_that_fails_alone(traced: Traced) -> None:
    trace_id, call = traced.request(10, seed=NAN_SEED)
    answer = Answer()
    await traced.client.follow(call, answer)
    assert answer.code is grpc.StatusCode.INTERNAL
    assert await traced.status(trace_id, "queue") == ("INTERNAL", True)
    failed = [s for s in traced.collector.of(trace_id) if s.service == "blockyard-engine"]
    assert [s.attributes["blockyard.end"] for s in failed if s.is_error] == ["error"]


async def test_a_lost_executor_is_an_event(traced: Traced) -> None:
    trace_id, call = traced.request(100, cache=pb.PrefixCache(off=True))
    answer = Answer()
    following = asyncio.create_task(traced.client.follow(call, answer))
    await until(lambda: bool(answer.num_messages))
    await traced.processes.executor.restart()
    await following
    assert answer.code is grpc.StatusCode.OK
    spans = await traced.spans(trace_id, "decode", "stream")
    assert "recovery" in {event.name for event in spans["decode"].events}
    assert spans["llm_request"].attributes["blockyard.recoveries"] == 1
    chunks = [s for s in traced.collector.of(trace_id) if s.name == "prefill.chunk"]
    assert {spans["prefill"].span_id, spans["decode"].span_id} == {c.parent_id for c in chunks}
    children = [s for s in spans.values() if s.parent_id == spans["llm_request"].span_id]
    assert covered_share(spans["blockyard.v1.GenerateService/Generate"], children) >= 0.99


@pytest.mark.parametrize(
    ("num_choices", "fields"),
    [(3, {"num_samples": 3}), (2, {"beam": pb.BeamSearch(width=3, num_choices=2)})],
)
async def test_branches_fork(traced: Traced, num_choices: int, fields: dict[str, Any]) -> None:
    trace_id, call = traced.request(20, **fields)
    assert len({message.choice_index async for message in call}) == num_choices
    spans = await traced.spans(trace_id, "decode", "stream")
    events = [event.name for name in ("prefill", "decode") for event in spans[name].events]
    assert events.count("fork") >= 2
    assert spans["llm_request"].attributes["blockyard.blocks.copied"] > 0
    assert "copy_on_write" in events
    assert ("beam_prune" in events) == ("beam" in fields)


async def test_steps_are_linked_with_who_joins(traced: Traced) -> None:
    ids = set()
    for _ in range(8):
        trace_id, call = traced.request(4, cache=pb.PrefixCache(off=True))
        await traced.client.follow(call, Answer())
        ids.add(trace_id)
    collector = traced.collector
    await collector.until(
        lambda: any(s.linked_trace_ids & ids for s in collector.named("engine.step"))
    )
    step = next(s for s in collector.named("engine.step") if s.linked_trace_ids & ids)
    await collector.until(lambda: len(collector.of(step.trace_id)) == 2)
    inner = next(s for s in collector.of(step.trace_id) if s is not step)
    assert (inner.name, inner.parent_id, step.parent_id) == ("executor.step", step.span_id, "")
    assert inner.attributes["blockyard.step_id"] == step.attributes["blockyard.step_id"]
    assert step.start_ns <= inner.start_ns <= inner.end_ns <= step.end_ns


async def test_what_the_client_sends_decides_and_nonsense_does_not(traced: Traced) -> None:
    begin_ns = time.time_ns()
    unsampled = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT), stop=pb.StopConditions(max_tokens=1)
    )
    stub = traced.client.stub
    for header in (
        *[unsampled] * 5,
        "00-xyz",
        "00-" + "0" * 32 + "-" + "0" * 16 + "-01",
        "01" * 99,
    ):
        async for _ in stub.Generate(request, metadata=(("traceparent", header),)):
            pass
    last, call = traced.request(1)
    await traced.client.follow(call, Answer())
    await traced.spans(last)
    new = [s for s in traced.collector.named("llm_request") if s.start_ns >= begin_ns]
    assert unsampled.split("-")[1] not in {span.trace_id for span in new}
    assert len(new) <= 4  # nonsense counts as no header: one in two


async def test_nothing_that_was_said_is_in_a_span(traced: Traced) -> None:
    request = pb.GenerateRequest(
        prompt="a b c d secret", stop=pb.StopConditions(max_tokens=5, strings=["secret"])
    )
    trace_id = secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
    await traced.client.stub.GenerateUnary(request, metadata=metadata)
    of = traced.collector.of
    await traced.collector.until(
        lambda: {"llm_request", "decode"} <= {s.name for s in of(trace_id)}
    )
    assert "secret" not in str(of(trace_id))


@pytest.mark.parametrize("is_frozen", [False, True])
async def test_no_collector_hurts_nobody(tmp_path: Path, is_frozen: bool) -> None:
    """Neither one that is not there, nor one that accepts connections and never answers."""
    endpoint = f"unix:{tmp_path}/nobody.sock"
    silent = None
    if is_frozen:
        path = f"{tmp_path}/silent.sock"
        silent = await asyncio.start_unix_server(lambda reader, writer: None, path)
        endpoint = f"unix:{path}"
    async with (
        asyncio.timeout(TIMEOUT_S),
        traced_system(tmp_path, endpoint, "--trace-sample-ratio", 1) as (client, *_),
    ):
        begin = time.monotonic()
        answers = await asyncio.gather(*(client.generate(PROMPT[:20], 20) for _ in range(4)))
        assert {answer.code for answer in answers} == {grpc.StatusCode.OK}
        assert time.monotonic() - begin < 5
        await asyncio.sleep(1.5)  # the exporters try meanwhile
        begin = time.monotonic()
    assert time.monotonic() - begin < 8  # both end, each waiting for 2 s at most
    if silent is not None:
        silent.close()

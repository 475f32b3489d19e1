from __future__ import annotations

import asyncio

import grpc
import pytest

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.errors import RequestError
from scheduler_svc.frontend import flush_policy
from scheduler_svc.frontend.choice_output import Chunk
from scheduler_svc.frontend.fanout import Fanout, Stop
from scheduler_svc.frontend.flush_policy import FlushPolicy
from scheduler_svc.frontend.output_stream import OutputOptions, OutputStream
from scheduler_svc.frontend.tests.fake_engine import branch_batch, finished
from scheduler_svc.telemetry.loop_lag import LoopLag


def open_stream(fanout: Fanout, max_buffered_tokens: int | None = 100) -> OutputStream:
    options = OutputOptions(
        max_buffered_tokens=max_buffered_tokens, is_streamed=max_buffered_tokens is not None
    )
    return fanout.open(options)


def taken(stream: OutputStream) -> Chunk:
    output = stream.take()
    assert output is not None
    (chunk,) = output.chunks
    return chunk


async def test_one_token_each_and_counted_columns() -> None:
    fanout = Fanout(LoopLag())
    first, second = open_stream(fanout), open_stream(fanout)
    keys = [first.key, second.key]
    fanout.apply(pb.OutputBatch(request_ids=keys, token_ids=[7, 8]))
    fanout.apply(pb.OutputBatch(request_ids=keys, token_counts=[1, 2], token_ids=[9, 10, 11]))
    assert taken(first).token_ids == [7, 9]
    assert taken(second).token_ids == [8, 10, 11]
    assert first.take() is None


async def test_branches_have_entries_of_their_own() -> None:
    fanout = Fanout(LoopLag())
    plain = open_stream(fanout)
    sampled = fanout.open(OutputOptions(num_choices=3, max_buffered_tokens=3))
    batch = pb.OutputBatch(
        request_ids=[sampled.key, plain.key, sampled.key],
        branches=[2, 0, 1],
        token_counts=[2, 1, 3],
        token_ids=[1, 2, 3, 4, 5, 6],
    )
    assert fanout.apply(batch) == []
    assert taken(plain).token_ids == [3]
    output = sampled.take()
    assert output is not None
    assert [(chunk.choice_index, chunk.token_ids) for chunk in output.chunks] == [
        (1, [4, 5, 6]),
        (2, [1, 2]),
    ]
    # The buffer's limit is a choice's; past it, all are aborted with one stop.
    batch.token_counts[:] = [4, 1, 1]
    stops = fanout.apply(batch)
    assert [(stop.request_id, stop.num_output_tokens) for stop in stops] == [(sampled.key, 0)]
    assert fanout.close(sampled) == []


async def test_a_request_is_aborted_unless_all_its_branches_ended() -> None:
    fanout = Fanout(LoopLag())
    streams = [fanout.open(OutputOptions(num_choices=2)) for _ in range(2)]
    for stream in streams:
        end = finished("LENGTH", branch=1, is_last=False)
        fanout.apply(branch_batch(stream.key, {}, end))
    fanout.apply(branch_batch(streams[1].key, {}, finished("LENGTH", branch=0)))
    assert [fanout.close(stream) for stream in streams] == [[Stop(streams[0].key)], []]


async def test_logprobs_stay_with_their_tokens_when_batches_merge() -> None:
    lag = LoopLag()
    lag.value_s = 1.0
    fanout = Fanout(lag)
    asked, plain = open_stream(fanout), open_stream(fanout)
    for first in (1.0, 3.0):
        batch = pb.OutputBatch(
            request_ids=[asked.key, plain.key, asked.key],
            token_ids=[7, 8, 9],
            num_logprobs=[1, 0, 1],
            token_logprobs=[-first, -first - 1],
        )
        fanout.apply(batch)
    chunk = taken(asked)
    assert chunk.token_ids == [7, 9, 7, 9]
    assert [entry.logprob for entry in chunk.logprobs] == [-1, -2, -3, -4]
    assert (taken(plain).token_ids, fanout.close(plain)) == ([8, 8], [Stop(plain.key)])


async def test_unknown_and_closed_requests_are_ignored() -> None:
    fanout = Fanout(LoopLag())
    stream = open_stream(fanout)
    assert fanout.close(stream) == [Stop(stream.key)]
    finish = finished("LENGTH")
    finish.request_id = stream.key
    batch = pb.OutputBatch(request_ids=[stream.key], token_ids=[7], finishes=[finish])
    batch.rejections.add(request_id=99, reason="TOO_LONG")
    assert fanout.apply(batch) == []


async def test_finished_stream_needs_no_abort() -> None:
    fanout = Fanout(LoopLag())
    stream = open_stream(fanout)
    finish = finished("LENGTH")
    finish.request_id = stream.key
    fanout.apply(pb.OutputBatch(finishes=[finish]))
    assert fanout.close(stream) == []
    assert fanout.num_open == 0


async def test_under_load_first_token_is_immediate_and_later_ones_merge() -> None:
    lag = LoopLag()
    lag.value_s = 1.0
    fanout = Fanout(lag)
    stream = open_stream(fanout)
    fanout.apply(pb.OutputBatch(request_ids=[stream.key], token_ids=[1]))
    assert stream.ready.is_set()
    stream.ready.clear()
    stream.take()
    for token_id in (2, 3):
        fanout.apply(pb.OutputBatch(request_ids=[stream.key], token_ids=[token_id]))
        assert not stream.ready.is_set()
    await asyncio.wait_for(stream.ready.wait(), 1)
    assert taken(stream).token_ids == [2, 3]
    stream.ready.clear()
    finish = finished("LENGTH")
    finish.request_id = stream.key
    fanout.apply(pb.OutputBatch(request_ids=[stream.key], token_ids=[4], finishes=[finish]))
    assert stream.ready.is_set()


async def test_idle_front_end_sends_every_token_at_once() -> None:
    fanout = Fanout(LoopLag())
    stream = open_stream(fanout)
    for _ in range(3):
        fanout.apply(pb.OutputBatch(request_ids=[stream.key], token_ids=[1]))
        assert stream.ready.is_set()
        stream.ready.clear()


async def test_collected_stream_wakes_only_at_its_end() -> None:
    fanout = Fanout(LoopLag())
    stream = open_stream(fanout, None)
    for _ in range(1000):
        fanout.apply(pb.OutputBatch(request_ids=[stream.key], token_ids=[1]))
    assert not stream.ready.is_set()
    finish = finished("LENGTH")
    finish.request_id = stream.key
    fanout.apply(pb.OutputBatch(finishes=[finish]))
    assert stream.ready.is_set()
    assert len(taken(stream).token_ids) == 1000


async def test_full_buffer_fails_one_stream_and_aborts_it() -> None:
    fanout = Fanout(LoopLag())
    slow, other = open_stream(fanout, 3), open_stream(fanout, 3)
    batch = pb.OutputBatch(request_ids=[slow.key, other.key], token_counts=[3, 1])
    batch.token_ids.extend([1, 1, 1, 2])
    assert fanout.apply(batch) == []
    assert taken(other).token_ids == [2]
    assert fanout.apply(batch) == [Stop(slow.key)]
    with pytest.raises(RequestError, match="too slowly") as caught:
        slow.take()
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert taken(other).token_ids == [2]
    assert fanout.apply(batch) == []
    assert fanout.close(slow) == []


async def test_unknown_rejection_reason_is_internal() -> None:
    fanout = Fanout(LoopLag())
    stream = open_stream(fanout)
    rejection = pb.Rejection(request_id=stream.key, reason="NEW", message="?")
    fanout.apply(pb.OutputBatch(rejections=[rejection]))
    with pytest.raises(RequestError) as caught:
        stream.take()
    assert caught.value.code == grpc.StatusCode.INTERNAL


def steady(num_streams: int, gap_s: float, *max_interval_s: float) -> FlushPolicy:
    policy = FlushPolicy(*max_interval_s)
    for step in range(200):
        policy.observe(num_streams, step * gap_s)
    return policy


def test_policy_merges_only_when_it_must() -> None:
    assert steady(8, 0.030).interval_s(0) == 0
    assert steady(64, 0.030).interval_s(0) == 0
    assert steady(256, 0.030).interval_s(0) == pytest.approx(0.0500, abs=0.002)
    # Few streams, but a device so fast that they would be thousands of messages a second.
    assert steady(32, 0.002).interval_s(0) == flush_policy.MIN_INTERVAL_S
    assert steady(8, 0.030).interval_s(0.030) == flush_policy.MAX_INTERVAL_S
    assert steady(5000, 0.030).interval_s(1.0) == flush_policy.MAX_INTERVAL_S
    assert steady(5000, 0.030, 0.012).interval_s(1.0) == 0.012
    assert steady(5000, 0.030, 0.0).interval_s(1.0) == 0


def test_policy_forgets_a_burst() -> None:
    policy = steady(256, 0.010)
    assert policy.interval_s(0) > 0
    for step in range(100):
        policy.observe(2, 10 + step * 0.030)
    assert policy.interval_s(0) == 0

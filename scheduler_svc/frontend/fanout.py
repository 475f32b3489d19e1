"""From the engine's batches to the open streams, and back: which requests to stop.

A batch is applied in one go, without awaiting; handlers run when their stream's event is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.frontend.detokenizer import Detokenizer
from scheduler_svc.frontend.flush_policy import FlushPolicy
from scheduler_svc.frontend.loop_lag import LoopLag
from scheduler_svc.frontend.output_stream import OutputStream
from scheduler_svc.frontend.stop_strings import StopStrings

Stops = list[tuple[int, int]]
"""(request id on the engine's stream, output tokens to keep; 0: abort)."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Fanout:
    """The open streams by key."""

    def __init__(self, lag: LoopLag) -> None:
        self._lag = lag
        self._policy = FlushPolicy()
        self._streams: dict[int, OutputStream] = {}
        self._last_key = 0
        self._waiting: list[OutputStream] = []
        self._flush_timer: asyncio.TimerHandle | None = None

    @property
    def num_open(self) -> int:
        """Streams between open and close."""
        return len(self._streams)

    def open(
        self,
        stop_token_ids: Sequence[int],
        detokenizer: Detokenizer | None,
        stop_strings: StopStrings | None,
        max_buffered_tokens: int | None,
    ) -> OutputStream:
        """Register a new stream under a new key; parameters as OutputStream's."""
        self._last_key += 1
        stream = OutputStream(
            self._last_key, stop_token_ids, detokenizer, stop_strings, max_buffered_tokens
        )
        self._streams[stream.key] = stream
        return stream

    def close(self, stream: OutputStream) -> Stops:
        """Forget a stream; returns the abort to send if the engine still works on it."""
        del self._streams[stream.key]
        return [(stream.key, 0)] if stream.is_open else []

    def apply(self, batch: pb.OutputBatch) -> Stops:
        """Take one batch: tokens first, then ends and refusals."""
        loop = asyncio.get_running_loop()
        self._policy.observe(len(batch.request_ids), loop.time())
        interval_s = self._policy.interval_s(self._lag.value_s)
        stops = self._push_all(batch, merge=interval_s > 0)
        for finish in batch.finishes:
            if (stream := self._streams.get(finish.request_id)) is not None:
                stream.finish(finish)
        for rejection in batch.rejections:
            if (stream := self._streams.get(rejection.request_id)) is not None:
                code = _CODES.get(rejection.code, grpc.StatusCode.INTERNAL)
                stream.fail(code, rejection.message)
        if self._waiting and self._flush_timer is None:
            self._flush_timer = loop.call_later(interval_s, self._flush)
        return stops

    def fail_all(self, code: grpc.StatusCode, message: str) -> None:
        """End every open stream with this status."""
        for stream in self._streams.values():
            stream.fail(code, message)

    def _push_all(self, batch: pb.OutputBatch, *, merge: bool) -> Stops:
        stops: Stops = []
        token_ids = list(batch.token_ids)
        counts = batch.token_counts or [1] * len(batch.request_ids)
        begin = 0
        for key, count in zip(batch.request_ids, counts, strict=True):
            end = begin + count
            stream = self._streams.get(key)
            if stream is not None and stream.is_open:
                is_first = stream.num_output_tokens == 0
                num_kept = stream.push(token_ids[begin:end])
                if num_kept is not None:
                    stops.append((key, num_kept))
                self._wake(stream, merge=merge and not is_first)
            begin = end
        return stops

    def _wake(self, stream: OutputStream, *, merge: bool) -> None:
        if not stream.is_open:
            stream.ready.set()
        elif merge:
            self._waiting.append(stream)
        elif stream.wants_waking:
            stream.ready.set()

    def _flush(self) -> None:
        self._flush_timer = None
        waiting, self._waiting = self._waiting, []
        for stream in waiting:
            if stream.wants_waking:
                stream.ready.set()

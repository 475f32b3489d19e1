"""From the engine's batches to the open streams, and back: which requests to stop.

A batch is applied in one go, without awaiting; handlers run when their stream's event is set.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.flush_policy import MAX_INTERVAL_S, FlushPolicy
from scheduler_svc.frontend.logprob_columns import LogprobColumns
from scheduler_svc.frontend.output_stream import OutputOptions, OutputStream
from scheduler_svc.telemetry.loop_lag import LoopLag


class Stop(NamedTuple):
    """What the engine is to end early."""

    request_id: int  # on the engine's stream
    num_output_tokens: int = 0  # to keep; 0: abort the request
    branch: int = 0  # that a stop string was found in


class Fanout:
    """The open streams by key."""

    def __init__(self, lag: LoopLag, max_merge_s: float = MAX_INTERVAL_S) -> None:
        """`max_merge_s`: longest that tokens are merged; 0: never."""
        self.interval_s = 0.0
        """How long tokens are merged now; 0: they are sent at once."""
        self._lag = lag
        self._policy = FlushPolicy(max_merge_s)
        self._streams: dict[int, OutputStream] = {}
        self._last_key = 0
        self._waiting: list[OutputStream] = []
        self._flush_timer: asyncio.TimerHandle | None = None

    @property
    def num_open(self) -> int:
        """Streams between open and close."""
        return len(self._streams)

    def open(self, options: OutputOptions) -> OutputStream:
        """Register a new stream under a new key."""
        self._last_key += 1
        stream = OutputStream(self._last_key, options)
        self._streams[stream.key] = stream
        return stream

    def close(self, stream: OutputStream) -> list[Stop]:
        """Forget a stream; returns the abort to send if the engine still works on it."""
        del self._streams[stream.key]
        return [Stop(stream.key)] if stream.is_running else []

    def apply(self, batch: pb.OutputBatch) -> list[Stop]:
        """Take one batch: tokens first, then ends and refusals."""
        loop = asyncio.get_running_loop()
        self._policy.observe(len(batch.request_ids), loop.time())
        interval_s = self.interval_s = self._policy.interval_s(self._lag.value_s)
        stops = self._push_all(batch, merge=interval_s > 0)
        for finish in batch.finishes:
            if (stream := self._streams.get(finish.request_id)) is not None:
                stream.finish(finish)
        for rejection in batch.rejections:
            if (stream := self._streams.get(rejection.request_id)) is not None:
                stream.fail(_error_of(rejection))
        if self._waiting and self._flush_timer is None:
            self._flush_timer = loop.call_later(interval_s, self._flush)
        return stops

    def fail_all(self, error: RequestError) -> None:
        """End every open stream with this error."""
        for stream in self._streams.values():
            stream.fail(error)

    def end_stalled(self, limit_s: float) -> list[Stop]:
        """Fail the streams whose client has taken nothing for `limit_s`; the aborts to send."""
        now_s = asyncio.get_running_loop().time()
        return [
            Stop(stream.key)
            for stream in self._streams.values()
            if stream.end_if_stalled(now_s, limit_s)
        ]

    def _push_all(self, batch: pb.OutputBatch, *, merge: bool) -> list[Stop]:
        stops: list[Stop] = []
        token_ids = list(batch.token_ids)
        num_entries = len(batch.request_ids)
        counts = batch.token_counts or [1] * num_entries
        branches = batch.branches or [0] * num_entries
        columns = LogprobColumns(batch) if batch.num_logprobs else None
        begin = 0
        for key, branch, count in zip(batch.request_ids, branches, counts, strict=True):
            end = begin + count
            logprobs = columns.take(count) if columns is not None else ()
            stream = self._streams.get(key)
            if stream is not None and stream.is_open(branch):
                is_first = stream.first_token_ns is None
                num_kept = stream.push(branch, token_ids[begin:end], logprobs)
                if num_kept is not None:
                    stops.append(Stop(key, num_kept, branch))
                    stream.ready.set()
                elif merge and not is_first:
                    self._waiting.append(stream)
                elif stream.wants_waking:
                    stream.ready.set()
            begin = end
        return stops

    def _flush(self) -> None:
        self._flush_timer = None
        waiting, self._waiting = self._waiting, []
        for stream in waiting:
            if stream.wants_waking:
                stream.ready.set()


def _error_of(rejection: pb.Rejection) -> RequestError:
    known = rejection.reason in Reason.__members__
    return RequestError(
        Reason(rejection.reason) if known else Reason.INTERNAL_ERROR,
        rejection.message,
        subject=rejection.subject,
        retry_delay_s=rejection.retry_delay_ns / 1e9 if rejection.retry_delay_ns else None,
    )

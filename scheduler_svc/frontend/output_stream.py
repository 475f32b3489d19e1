"""One request's output on its way from the engine to its client.

Tokens are taken as they come and cost little; text is made when the client's handler takes a
chunk, except with stop strings, which must be looked for token by token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.detokenizer import Detokenizer
from scheduler_svc.frontend.stop_strings import StopStrings
from scheduler_svc.frontend.validation import RequestError


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the output is complete."""

    reason: pb.FinishReason.ValueType
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What only the engine knows of a finished request."""

    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a client has not got yet."""

    token_ids: list[int]
    text: str
    ending: Ending | None
    usage: EngineUsage | None
    """Set in the last chunk."""


class OutputStream:
    """Buffer between the engine's batches and one handler, which waits for `ready`."""

    def __init__(
        self,
        key: int,
        stop_token_ids: Sequence[int],
        detokenizer: Detokenizer | None,
        stop_strings: StopStrings | None,
        max_buffered_tokens: int | None,
    ) -> None:
        """Start empty.

        Args:
            key: the request's id on the engine's stream.
            stop_token_ids: their text is not part of the output.
            detokenizer: None: no text.
            stop_strings: needs a detokenizer.
            max_buffered_tokens: more fail the stream. None: the handler takes all at the end.
        """
        self.key = key
        self.ready = asyncio.Event()
        self.num_output_tokens = 0
        self.first_token_ns: int | None = None
        self._stop_token_ids = frozenset(stop_token_ids)
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._max_buffered_tokens = max_buffered_tokens
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._ending: Ending | None = None
        self._is_ending_taken = False
        self._usage: EngineUsage | None = None
        self._error: RequestError | None = None

    @property
    def is_open(self) -> bool:
        """Whether more tokens are wanted; the engine still works on the request."""
        return self._ending is None and self._error is None

    @property
    def waits_for_usage(self) -> bool:
        """Whether only the engine's numbers are missing."""
        return self._ending is not None and self._usage is None

    @property
    def wants_waking(self) -> bool:
        """Whether new tokens alone should wake the handler."""
        return self._max_buffered_tokens is not None

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Take new tokens while open.

        Returns what the engine must be told: None: nothing; else how many output tokens to keep
        (a stop string was found), 0 to abort (the client reads too slowly).
        """
        if self.first_token_ns is None:
            self.first_token_ns = time.monotonic_ns()
        if self._stop_strings is not None:
            return self._push_matching(token_ids, self._stop_strings)
        self._token_ids.extend(token_ids)
        self.num_output_tokens += len(token_ids)
        return self._check_buffer()

    def finish(self, finish: engine_pb.Finish) -> None:
        """The engine's end of the request; its last tokens were pushed before."""
        if self._error is not None:
            return
        if finish.reason == engine_pb.FINISH_REASON_ERROR:
            self.fail(grpc.StatusCode.INTERNAL, finish.error_message or "the request failed")
            return
        self._usage = EngineUsage(finish.num_cached_tokens, finish.num_preemptions)
        if self._ending is None:
            self._ending = self._end_text() or _ending_of(finish)
        self.ready.set()

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        """End with an error; what was not taken is dropped. Complete output stays valid."""
        if self._ending is not None:
            self.settle()
            return
        self._error = RequestError(code, message)
        self._token_ids.clear()
        self._text.clear()
        self.ready.set()

    def settle(self) -> None:
        """Give up waiting for the engine's numbers."""
        if self._usage is None:
            self._usage = EngineUsage()
            self.ready.set()

    def take(self) -> Chunk | None:
        """What is new, or None. Raises RequestError if the stream failed."""
        if self._error is not None:
            raise self._error
        token_ids, self._token_ids = self._token_ids, []
        ending = None if self._is_ending_taken else self._ending
        if not token_ids and ending is None and self._usage is None:
            return None
        if self._stop_strings is None:
            self._text.append(self._decode(token_ids))
            if ending is not None and self._detokenizer is not None:
                self._text.append(self._detokenizer.flush())
        text = "".join(self._text)
        self._text.clear()
        self._is_ending_taken = self._ending is not None
        return Chunk(token_ids, text, ending, self._usage)

    def _push_matching(self, token_ids: Sequence[int], stop_strings: StopStrings) -> int | None:
        for token_id in token_ids:
            self._token_ids.append(token_id)
            self.num_output_tokens += 1
            text, found = stop_strings.feed(self._decode([token_id]))
            self._text.append(text)
            if found is not None:
                self._ending = Ending(pb.FINISH_REASON_STOP, stop_string=found)
                return self.num_output_tokens
        return self._check_buffer()

    def _check_buffer(self) -> int | None:
        limit = self._max_buffered_tokens
        if limit is None or len(self._token_ids) <= limit:
            return None
        self.fail(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the client reads too slowly: more than {limit} tokens are waiting for it",
        )
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._detokenizer is None or not token_ids:
            return ""
        # A stop token ends the request, so it can only be the last.
        if token_ids[-1] in self._stop_token_ids:
            token_ids = token_ids[:-1]
        return self._detokenizer.feed(token_ids)

    def _end_text(self) -> Ending | None:
        """Release text that was held back; even that can complete a stop string."""
        if self._stop_strings is None or self._detokenizer is None:
            return None
        text, found = self._stop_strings.feed(self._detokenizer.flush())
        self._text.append(text)
        if found is not None:
            return Ending(pb.FINISH_REASON_STOP, stop_string=found)
        self._text.append(self._stop_strings.flush())
        return None


def _ending_of(finish: engine_pb.Finish) -> Ending:
    if finish.reason == engine_pb.FINISH_REASON_LENGTH:
        return Ending(pb.FINISH_REASON_LENGTH)
    has_token = finish.HasField("stop_token_id")
    return Ending(pb.FINISH_REASON_STOP, finish.stop_token_id if has_token else None)

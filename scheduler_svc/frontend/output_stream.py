"""One request's output between the engine's batches and the handler of its call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.choice_output import ChoiceOutput, Chunk
from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.stop_strings import StopStrings
from scheduler_svc.frontend.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a request's output is to be."""

    num_choices: int = 1
    is_beam: bool = False
    vocabulary: Vocabulary | None = None  # None: no text
    stop_token_ids: Sequence[int] = ()  # their text is not part of the output
    stop_strings: Sequence[str] = ()  # need a vocabulary
    # Of one choice; more fail the stream. None: no limit.
    max_buffered_tokens: int | None = None
    is_streamed: bool = True  # False: the handler takes all at the end


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What only the engine knows of a finished request."""

    num_cached_tokens: int = 0
    num_preemptions: int = 0
    blocks: engine_pb.BlockUsage = field(default_factory=engine_pb.BlockUsage)
    num_recoveries: int = 0
    queue_ns: int = 0  # from submission to first admission


class Output(NamedTuple):
    """What a client has not got yet."""

    chunks: list[Chunk]  # at most one a choice
    usage: EngineUsage | None  # set in the last output


class OutputStream:
    """The choices of one request; one handler waits for `ready`."""

    def __init__(self, key: int, options: OutputOptions) -> None:
        """Start empty; `key` is the request's id on the engine's stream."""
        self.key = key
        self.ready = asyncio.Event()
        self.first_token_ns: int | None = None
        self._is_streamed = options.is_streamed
        self._max_buffered_tokens = options.max_buffered_tokens
        self._choices = _choices(options)
        self._running = set(range(options.num_choices))  # branches that the engine works on
        self._usage: EngineUsage | None = None
        self._error: RequestError | None = None
        # While its handler waits for the transport to take a message: since when, on the event
        # loop's clock [s], and who waits.
        self.writing_since_s: float | None = None
        self._writer: asyncio.Task[Any] | None = None

    @property
    def num_output_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(choice.num_output_tokens for choice in self._choices)

    @property
    def num_choices(self) -> int:
        """Choices asked for."""
        return len(self._choices)

    @property
    def usage(self) -> EngineUsage | None:
        """The engine's numbers, once it has sent them."""
        return self._usage

    @property
    def is_running(self) -> bool:
        """Whether the engine works on any of it."""
        return bool(self._running)

    @property
    def waits_for_usage(self) -> bool:
        """Whether only the engine's numbers are missing."""
        return self._usage is None and all(choice.has_ended for choice in self._choices)

    @property
    def wants_waking(self) -> bool:
        """Whether new tokens alone should wake the handler."""
        return self._is_streamed

    def is_open(self, branch: int) -> bool:
        """Whether more tokens of a branch are wanted."""
        return self._error is None and self._choices[branch].is_open

    def push(
        self, branch: int, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprob] = ()
    ) -> int | None:
        """Take new tokens of an open branch, and their log-probabilities, parallel or none.

        Returns what the engine must be told: None: nothing; else how many output tokens to keep of
        the branch (a stop string was found), 0 to abort all (the client reads too slowly).
        """
        choice = self._choices[branch]
        if self.first_token_ns is None:
            self.first_token_ns = time.monotonic_ns()
        if choice.push(token_ids, logprobs):
            self._running.discard(branch)
            return choice.num_output_tokens
        limit = self._max_buffered_tokens
        if limit is None or choice.num_buffered_tokens <= limit:
            return None
        self.fail(_slow_reader(f"more than {limit} tokens are waiting for it"))
        return 0

    def finish(self, finish: engine_pb.Finish) -> None:
        """The engine's end of a branch; its last tokens were pushed before."""
        is_over = finish.HasField("blocks")
        if is_over:
            self._running.clear()
        self._running.discard(finish.branch)
        if self._error is not None:
            return
        if finish.reason == engine_pb.FINISH_REASON_ERROR:
            message = finish.error_message or "the request failed"
            self._end(RequestError(Reason.REQUEST_FAILED, message))
            return
        self._choices[finish.branch].finish(finish)
        if is_over:
            self._usage = EngineUsage(
                finish.num_cached_tokens,
                finish.num_preemptions,
                finish.blocks,
                finish.num_recoveries,
                finish.queue_ns,
            )
        self.ready.set()

    async def write(self, send: Callable[[bytes], Awaitable[None]], message: bytes) -> None:
        """Hand a message to the transport, which waits for the client if that reads slowly.

        Raises RequestError if the stream fails meanwhile as that of a slow reader.
        """
        self._writer = asyncio.current_task()
        self.writing_since_s = asyncio.get_running_loop().time()
        try:
            await send(message)
        except asyncio.CancelledError:
            if self._error is None or self._error.reason is not Reason.SLOW_READER:
                raise  # the client cancelled, or is gone
            raise self._error from None
        finally:
            self.writing_since_s = None

    def end_if_stalled(self, now_s: float, limit_s: float) -> bool:
        """Fail the stream if the client has taken nothing for `limit_s`; whether it failed now.

        The engine must then be told to abort.
        """
        if self.writing_since_s is None or now_s - self.writing_since_s < limit_s:
            return False
        self.fail(_slow_reader(f"it took nothing for {limit_s:g} s"))
        return True

    def fail(self, error: RequestError) -> None:
        """The engine does not work on it any more: refused, lost, or about to be told to abort.

        What was not taken is dropped, but complete output stays valid.
        """
        self._running.clear()
        self._end(error)
        is_slow = error.reason is Reason.SLOW_READER
        if is_slow and self.writing_since_s is not None and self._writer is not None:
            self._writer.cancel()  # the transport may never take what it has

    def settle(self) -> None:
        """Give up waiting for the engine's numbers."""
        if self._usage is None:
            self._usage = EngineUsage()
            self.ready.set()

    def take(self) -> Output | None:
        """What is new, or None. Raises RequestError if the stream failed."""
        if self._error is not None:
            raise self._error
        chunks = [chunk for choice in self._choices if (chunk := choice.take()) is not None]
        if not chunks and self._usage is None:
            return None
        return Output(chunks, self._usage)

    def _end(self, error: RequestError) -> None:
        is_stuck = error.reason is Reason.SLOW_READER and self.writing_since_s is not None
        if all(choice.has_ended for choice in self._choices) and not is_stuck:
            self.settle()
            return
        self._error = error
        for choice in self._choices:
            choice.drop()
        self.ready.set()


def _slow_reader(problem: str) -> RequestError:
    message = f"the client reads too slowly: {problem}"
    return RequestError(Reason.SLOW_READER, message, subject="output not read")


def _choices(options: OutputOptions) -> list[ChoiceOutput]:
    stop_token_ids = frozenset(options.stop_token_ids)
    stop_strings = StopStrings(options.stop_strings) if options.stop_strings else None
    vocabulary = options.vocabulary
    return [
        ChoiceOutput(
            index,
            stop_token_ids,
            None if vocabulary is None else new_detokenizer(vocabulary),
            None if stop_strings is None else stop_strings.fresh(),
            is_beam=options.is_beam,
        )
        for index in range(options.num_choices)
    ]

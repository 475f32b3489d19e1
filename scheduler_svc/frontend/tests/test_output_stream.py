from __future__ import annotations

import asyncio
import time

import pytest

from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.choice_output import Chunk
from scheduler_svc.frontend.output_stream import Output, OutputOptions, OutputStream
from scheduler_svc.frontend.tests.fake_engine import finished
from scheduler_svc.frontend.vocabulary import ByteLevelVocabulary
from scheduler_svc.telemetry.loop_lag import LoopLag

STOP_ID = 256


def stream_of(*stop_strings: str, num_choices: int = 1, is_beam: bool = False) -> OutputStream:
    """Token ids are bytes; STOP_ID has text, which must not appear."""
    options = OutputOptions(
        num_choices=num_choices,
        is_beam=is_beam,
        vocabulary=ByteLevelVocabulary([*(bytes([value]) for value in range(256)), b"<stop>"]),
        stop_token_ids=[STOP_ID],
        stop_strings=stop_strings,
        max_buffered_tokens=None if is_beam else 1000,
    )
    return OutputStream(1, options)


def taken(stream: OutputStream) -> Output:
    output = stream.take()
    assert output is not None
    return output


def chunk_of(stream: OutputStream) -> Chunk:
    """The new chunk of the only choice that has one."""
    (chunk,) = taken(stream).chunks
    return chunk


@pytest.mark.parametrize("stop_strings", [(), ("never",)])
def test_stop_tokens_text_is_left_out(stop_strings: tuple[str, ...]) -> None:
    stream = stream_of(*stop_strings)
    stream.push(0, [*b"ab", STOP_ID])
    stream.finish(finished("STOP", stop_token_id=STOP_ID))
    chunk = chunk_of(stream)
    assert chunk.text == "ab"
    assert chunk.token_ids[-1] == STOP_ID
    assert chunk.ending is not None
    assert chunk.ending.stop_token_id == STOP_ID


@pytest.mark.parametrize("stop_strings", [(), ("never",)])
def test_half_a_character_is_replaced_at_the_end_only(stop_strings: tuple[str, ...]) -> None:
    stream = stream_of(*stop_strings)
    stream.push(0, [*b"ab", 0xC3])
    assert chunk_of(stream).text == "ab"
    stream.finish(finished("LENGTH"))
    assert chunk_of(stream).text == "\ufffd"


def test_text_that_was_held_back_comes_at_the_end() -> None:
    stream = stream_of("END")
    stream.push(0, b"the EN")
    assert chunk_of(stream).text == "the "
    stream.finish(finished("LENGTH"))
    assert chunk_of(stream).text == "EN"


def test_even_the_end_can_complete_a_stop_string() -> None:
    stream = stream_of("a\ufffd")
    stream.push(0, [*b"xa", 0xC3])
    assert chunk_of(stream).text == "x"
    stream.finish(finished("LENGTH"))
    chunk = chunk_of(stream)
    assert chunk.ending is not None
    assert (chunk.text, chunk.ending.stop_string) == ("", "a\ufffd")
    assert chunk.ending.reason == pb.FINISH_REASON_STOP
    assert stream.num_output_tokens == 3


def test_loss_after_a_stop_string_is_no_error() -> None:
    stream = stream_of("b")
    assert stream.push(0, b"abc") == 2
    stream.fail(RequestError(Reason.ENGINE_LOST, "lost"))
    output = taken(stream)
    (chunk,) = output.chunks
    assert (chunk.text, chunk.token_ids) == ("a", list(b"ab"))
    assert output.usage is not None


def test_numbers_come_with_the_last_end_or_not_at_all() -> None:
    stream = stream_of("b", num_choices=2)
    assert stream.push(0, b"ab") == 2
    stream.finish(finished("STOP", branch=0, is_last=False))
    waits = [stream.waits_for_usage]
    assert taken(stream).usage is None
    assert stream.push(1, b"aab") == 3
    waits.append(stream.waits_for_usage)
    assert waits == [False, True]
    assert not stream.is_running
    assert taken(stream).usage is None
    stream.settle()
    output = taken(stream)
    assert output.chunks == []
    assert output.usage is not None


def test_loss_before_the_last_choice_ended_is_an_error() -> None:
    stream = stream_of("b", num_choices=2)
    stream.push(0, b"ab")
    stream.fail(RequestError(Reason.ENGINE_LOST, "lost"))
    with pytest.raises(RequestError, match="lost"):
        stream.take()


def test_a_beam_is_cut_at_its_stop_string_but_ends_with_its_score() -> None:
    stream = stream_of("END", is_beam=True)
    assert stream.push(0, b"the ENDs") is None
    assert not stream.is_open(0)
    assert stream.is_running
    chunk = chunk_of(stream)
    assert (chunk.text, chunk.token_ids, chunk.ending) == ("the ", list(b"the END"), None)
    stream.finish(finished("STOP", score=-0.5))
    ending = chunk_of(stream).ending
    assert ending is not None
    assert (ending.stop_string, ending.score) == ("END", -0.5)


def test_failure_drops_what_was_not_taken() -> None:
    stream = stream_of()
    stream.push(0, b"abc")
    stream.fail(RequestError(Reason.ENGINE_LOST, "lost"))
    stream.finish(finished("LENGTH"))
    with pytest.raises(RequestError, match="lost"):
        stream.take()


async def test_loop_lag_sees_a_blocked_loop() -> None:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0.1)
    quiet_s = lag.value_s
    for _ in range(3):
        time.sleep(0.1)  # noqa: ASYNC251 - blocking is the point
        await asyncio.sleep(0.03)
    task.cancel()
    assert lag.value_s > quiet_s + 0.01

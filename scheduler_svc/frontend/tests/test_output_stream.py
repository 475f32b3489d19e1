from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.loop_lag import LoopLag
from scheduler_svc.frontend.output_stream import OutputStream
from scheduler_svc.frontend.stop_strings import StopStrings
from scheduler_svc.frontend.tests.fake_engine import finished
from scheduler_svc.frontend.validation import RequestError
from scheduler_svc.frontend.vocabulary import ByteLevelVocabulary

STOP_ID = 256


def stream_of(*stop_strings: str) -> OutputStream:
    """Token ids are bytes; STOP_ID has text, which must not appear."""
    pieces = [bytes([value]) for value in range(256)] + [b"<stop>"]
    detokenizer = new_detokenizer(ByteLevelVocabulary(pieces))
    stops = StopStrings(stop_strings) if stop_strings else None
    return OutputStream(1, [STOP_ID], detokenizer, stops, 1000)


def text_of(stream: OutputStream) -> str:
    chunk = stream.take()
    return chunk.text if chunk else ""


@pytest.mark.parametrize("stop_strings", [(), ("never",)])
def test_stop_tokens_text_is_left_out(stop_strings: tuple[str, ...]) -> None:
    stream = stream_of(*stop_strings)
    stream.push([*b"ab", STOP_ID])
    stream.finish(finished("STOP", stop_token_id=STOP_ID))
    chunk = stream.take()
    assert chunk is not None
    assert chunk.text == "ab"
    assert chunk.token_ids[-1] == STOP_ID
    assert chunk.ending is not None
    assert chunk.ending.stop_token_id == STOP_ID


@pytest.mark.parametrize("stop_strings", [(), ("never",)])
def test_half_a_character_is_replaced_at_the_end_only(stop_strings: tuple[str, ...]) -> None:
    stream = stream_of(*stop_strings)
    stream.push([*b"ab", 0xC3])
    assert text_of(stream) == "ab"
    stream.finish(finished("LENGTH"))
    assert text_of(stream) == "\ufffd"


def test_text_that_was_held_back_comes_at_the_end() -> None:
    stream = stream_of("END")
    stream.push(b"the EN")
    assert text_of(stream) == "the "
    stream.finish(finished("LENGTH"))
    assert text_of(stream) == "EN"


def test_even_the_end_can_complete_a_stop_string() -> None:
    stream = stream_of("a\ufffd")
    stream.push([*b"xa", 0xC3])
    assert text_of(stream) == "x"
    stream.finish(finished("LENGTH"))
    chunk = stream.take()
    assert chunk is not None
    assert chunk.ending is not None
    assert (chunk.text, chunk.ending.stop_string) == ("", "a\ufffd")
    assert chunk.ending.reason == pb.FINISH_REASON_STOP
    assert stream.num_output_tokens == 3


def test_loss_after_a_stop_string_is_no_error() -> None:
    stream = stream_of("b")
    assert stream.push(b"abc") == 2
    stream.fail(grpc.StatusCode.UNAVAILABLE, "lost")
    chunk = stream.take()
    assert chunk is not None
    assert (chunk.text, chunk.token_ids) == ("a", list(b"ab"))
    assert chunk.usage is not None


def test_failure_drops_what_was_not_taken() -> None:
    stream = stream_of()
    stream.push(b"abc")
    stream.fail(grpc.StatusCode.UNAVAILABLE, "lost")
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

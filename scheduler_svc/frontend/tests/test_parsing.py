from __future__ import annotations

import grpc
import pytest

from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import RequestError
from scheduler_svc.frontend.parsing import parse


def wire(request: pb.GenerateRequest) -> bytes:
    """The request's bytes with each "?" in them made a byte that is not UTF-8."""
    return request.SerializeToString().replace(b"?", b"\xff")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(prompt="a?"), "prompt"),
        (pb.GenerateRequest(prompt="a", request_id="?"), "request_id"),
        (pb.GenerateRequest(stop=pb.StopConditions(strings=["a", "b?"])), "stop.strings[1]"),
        (
            pb.GenerateRequest(
                chat=pb.ChatMessages(
                    messages=[pb.ChatMessage(role="user"), pb.ChatMessage(content="?")]
                )
            ),
            "chat.messages[1].content",
        ),
    ],
)
def test_text_that_is_not_utf_8_is_named(request_: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(pb.GenerateRequest, wire(request_))
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value) == f"{field} is not valid UTF-8"


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x7f",  # longer than the message
        b"\x22\x02\x12\x05",  # a sub-message with the same fault
        b"\xff",  # half a tag
    ],
)
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(RequestError, match="not a valid GenerateRequest") as caught:
        parse(pb.GenerateRequest, data)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_fields_and_unknown_fields_may_hold_anything() -> None:
    request = pb.GenerateRequest(prompt="a", cache=pb.PrefixCache(salt=b"\xff"))
    data = request.SerializeToString() + b"\xfa\x01\x01\xff"  # field 31, one byte
    parsed = parse(pb.GenerateRequest, data)
    assert parsed.prompt == "a"
    assert parsed.cache.salt == b"\xff"
    with pytest.raises(RequestError, match=r"^prompt is not valid UTF-8$"):
        parse(pb.GenerateRequest, data.replace(b"\x0a\x01a", b"\x0a\x01\xff"))

"""Malformed requests: bytes that are no message, messages that make no sense, and broken frames."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Final

from blockyard.v1 import generate_pb2 as pb

MAX_REQUEST_BYTES: Final = 1 << 16
"""What the front end under attack takes; so that too large is not large."""

_GENERATE: Final = "/blockyard.v1.GenerateService/Generate"
METHODS: Final = (_GENERATE, f"{_GENERATE}Unary", "/blockyard.v1.GenerateService/GetModel")

_SPECIAL_NUMBERS: Final = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_SPECIAL_FLOATS: Final = (0.0, -0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))


def valid_request(rng: random.Random) -> pb.GenerateRequest:
    """A small request with many fields set, all of them in range."""
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=7),
        stop=pb.StopConditions(max_tokens=3, strings=["stop"], token_ids=[5], ignore_eos=True),
        request_id="r",
        logprobs=pb.Logprobs(num_candidates=2),
        cache=pb.PrefixCache(salt=b"salt"),
        priority=1,
    )
    kind = rng.randrange(3)
    if kind == 0:
        request.prompt = "once upon a time"
    elif kind == 1:
        request.token_ids.ids.extend([1, 2, 3])
    else:
        request.chat.messages.add(role="user", content="hello")
    return request


def random_bytes(rng: random.Random) -> bytes:
    """No structure at all."""
    return rng.randbytes(rng.choice((0, 1, 2, 5, 20, 100, 400)))


def mutated(rng: random.Random) -> bytes:
    """A valid request with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(valid_request(rng).SerializeToString())
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case _:
                del data[at:]
    return bytes(data)


def nonsense(rng: random.Random, depth: int = 0) -> bytes:
    """Well-formed fields, known and unknown, of any type and value, nested."""
    data = b""
    for _ in range(rng.randint(1, 6)):
        number = rng.choice((rng.randint(1, 12), rng.randint(1, 2**29 - 1)))
        kind = rng.choice((0, 1, 2, 2, 2, 5))
        data += varint(number << 3 | kind)
        if kind == 0:
            data += varint(rng.choice(_SPECIAL_NUMBERS))
        elif kind == 1:
            data += struct.pack("<d", rng.choice(_SPECIAL_FLOATS))
        elif kind == 5:
            data += struct.pack("<f", rng.choice(_SPECIAL_FLOATS))
        else:
            inner = nonsense(rng, depth + 1) if depth < 4 and rng.random() < 0.5 else _text(rng)
            data += varint(len(inner)) + inner
    return data


def out_of_range(rng: random.Random) -> bytes:
    """A request in which one field has a value that it must not have."""
    request = valid_request(rng)
    number, real = rng.choice(_SPECIAL_NUMBERS), rng.choice(_SPECIAL_FLOATS)
    changes: tuple[Callable[[], object], ...] = (
        lambda: setattr(request.sampling, "temperature", real),
        lambda: setattr(request.sampling, "top_p", real),
        lambda: setattr(request.sampling, "min_p", real),
        lambda: setattr(request.stop, "max_tokens", number & 0xFFFFFFFF),
        lambda: setattr(request, "num_samples", number & 0xFFFFFFFF),
        lambda: setattr(request.logprobs, "num_candidates", number & 0xFFFFFFFF),
        lambda: setattr(request.beam, "width", number & 0xFFFFFFFF),
        lambda: setattr(request.beam, "length_penalty", real),
        lambda: setattr(request, "priority", rng.choice((-(2**31), 2**31 - 1, 11, -11))),
        lambda: request.token_ids.ids.extend([number & 0xFFFFFFFF] * rng.randint(1, 50)),
        lambda: setattr(request.cache, "salt", rng.randbytes(rng.choice((0, 64, 65, 1000)))),
        lambda: setattr(request, "request_id", rng.choice(("\n", "\x00", "x" * 129, "\u202e"))),
        lambda: request.stop.strings.extend(["", "x" * 5000][: rng.randint(1, 2)]),
        lambda: request.chat.messages.add(role=rng.choice(("", "root")), content="\x00" * 99),
    )
    rng.choice(changes)()
    return request.SerializeToString()


def huge(rng: random.Random) -> bytes:
    """Long fields, many fields, deep nesting; some of it larger than what is taken at all."""
    size = rng.choice((MAX_REQUEST_BYTES // 4, MAX_REQUEST_BYTES - 100, 2 * MAX_REQUEST_BYTES))
    match rng.randrange(5):
        case 0:
            return pb.GenerateRequest(prompt="x" * size).SerializeToString()
        case 1:
            ids = pb.TokenIds(ids=[1] * size)
            return pb.GenerateRequest(token_ids=ids).SerializeToString()
        case 2:
            turns = [pb.ChatMessage(role="user", content="x")] * (size // 10)
            return pb.GenerateRequest(chat=pb.ChatMessages(messages=turns)).SerializeToString()
        case 3:
            return b"\x1b" * (size // 2)  # groups that begin in groups
        case _:
            return b"\x0a" + varint(2**31 - 1) + b"x" * 50  # says that it is longer than it is


KINDS: Final[dict[str, tuple[float, Callable[[random.Random], bytes]]]] = {
    "random bytes": (0.2, random_bytes),
    "mutated request": (0.35, mutated),
    "nonsense fields": (0.2, nonsense),
    "out of range": (0.24, out_of_range),
    "huge": (0.01, huge),
}
"""What is sent as a request, and how much of it."""


def broken_stream(rng: random.Random) -> tuple[str, bytes]:
    """What a connection sends that does not keep to HTTP/2, or to gRPC over it; and its kind."""
    kind = rng.choice(tuple(_STREAMS))
    return kind, _STREAMS[kind](rng)


_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _END_HEADERS = 1, 4


def varint(number: int) -> bytes:
    """A protobuf varint."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(*more: tuple[str, str]) -> bytes:
    """The header block of a call of Generate, without compression; see RFC 7541, 6.2.2."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", _GENERATE), (":authority", "x")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data


def _text(rng: random.Random) -> bytes:
    return rng.choice((b"", b"\xff\xfe", b"a" * rng.randint(1, 300), rng.randbytes(20), b"\x00"))


def _open(*frames: bytes) -> bytes:
    return _PREFACE + frame(_SETTINGS, 0, 0) + b"".join(frames)


def _message(rng: random.Random) -> bytes:
    data = valid_request(rng).SerializeToString()
    return b"\x00" + struct.pack(">I", len(data)) + data


def _call(*frames: bytes, more: tuple[tuple[str, str], ...] = ()) -> bytes:
    return _open(frame(_HEADERS, _END_HEADERS, 1, headers(*more)), *frames)


def _random_frames(rng: random.Random) -> bytes:
    def some_frame() -> bytes:
        payload = rng.randbytes(rng.choice((0, 1, 4, 5, 8, 40)))
        return frame(rng.randrange(12), rng.randrange(256), rng.randrange(4), payload)

    return _call(*(some_frame() for _ in range(rng.randint(1, 5))))


def _cut(rng: random.Random) -> bytes:
    data = _call(frame(_DATA, _END_STREAM, 1, _message(rng)))
    return data[: rng.randrange(1, len(data))]


_STREAMS: Final[dict[str, Callable[[random.Random], bytes]]] = {
    "not HTTP/2": lambda rng: rng.randbytes(rng.randint(1, 200)),
    "HTTP/1": lambda rng: b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    "cut short": _cut,
    "random frames": _random_frames,
    "frame too large": lambda rng: _call(b"\xff\xff\xff" + struct.pack(">BBI", _DATA, 0, 1)),
    "length prefix lies": lambda rng: _call(
        frame(_DATA, _END_STREAM, 1, b"\x00" + struct.pack(">I", rng.choice((7, 2**32 - 1))) + b"x")
    ),
    "compressed by nothing": lambda rng: _call(
        frame(_DATA, _END_STREAM, 1, b"\x01" + _message(rng)[1:])
    ),
    "no message": lambda rng: _call(frame(_DATA, _END_STREAM, 1)),
    "two messages": lambda rng: _call(frame(_DATA, _END_STREAM, 1, _message(rng) * 2)),
    "broken headers": lambda rng: _open(frame(_HEADERS, _END_HEADERS, 1, rng.randbytes(30))),
    "headers without end": lambda rng: _open(
        frame(_HEADERS, 0, 1, headers()),
        *[frame(_CONTINUATION, 0, 1, b"\x00\x01a\x7a" + b"b" * 122)] * 200,
    ),
    "odd timeouts": lambda rng: _call(
        frame(_DATA, _END_STREAM, 1, _message(rng)),
        more=(("grpc-timeout", rng.choice(("", "1", "99999999999H", "-1S", "0n", "1x"))),),
    ),
    "reset at once": lambda rng: _call(
        frame(_DATA, 0, 1, _message(rng)), frame(_RST, 0, 1, b"\0\0\0\x08")
    ),
    "many resets": lambda rng: _open(
        *(
            frame(_HEADERS, _END_HEADERS, 2 * index + 1, headers())
            + frame(_RST, 0, 2 * index + 1, b"\0\0\0\x08")
            for index in range(50)
        )
    ),
    "pings": lambda rng: _open(*[frame(_PING, 0, 0, b"12345678")] * 100),
    "window too large": lambda rng: _call(*[frame(_WINDOW, 0, 1, b"\x7f\xff\xff\xff")] * 2),
    "odd settings": lambda rng: _open(frame(_SETTINGS, 0, 0, rng.randbytes(6 * rng.randint(1, 5)))),
    "goodbye": lambda rng: _call(frame(_GOAWAY, 0, 0, bytes(8))),
}

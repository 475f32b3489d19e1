"""Attacks a running front end with what `hostile_messages` makes, and judges the answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from integration_tests.engine_client import EngineClient
from integration_tests.harness import Processes, fake_model_dir, running
from integration_tests.hostile_messages import (
    KINDS,
    MAX_REQUEST_BYTES,
    METHODS,
    broken_stream,
    headers,
)
from integration_tests.public_client import PublicClient
from integration_tests.reference import reference_output

_VOCAB_SIZE: Final = 400
_TIMEOUT_S: Final = 2.0
"""Of a request: what is valid after all may ask for a long output."""
_NUM_IN_FLIGHT: Final = 32
_NUM_CONNECTIONS: Final = 24
_ANSWER_S: Final = 0.2
"""How long a broken stream waits for the server to say something more."""
_DRIP_S: Final = 0.02

_LIBRARY_STATUSES: Final = frozenset({"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
"""Given by the gRPC library, so without details: too large, too late. See docs/api.md."""


@dataclass(slots=True)
class Outcome:
    """What became of an attack."""

    # (kind, status, reason) of requests; (kind, how it ended) of connections.
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    connections: Counter[tuple[str, str]] = field(default_factory=Counter)
    untyped: list[str] = field(default_factory=list)  # answers that docs/api.md does not know

    @property
    def num_sent(self) -> int:
        """Requests and connections."""
        return self.requests.total() + self.connections.total()


class Target:
    """A system under attack, and well-behaved clients of it."""

    def __init__(
        self, processes: Processes, addresses: list[str], public: PublicClient, engine: EngineClient
    ) -> None:
        self.processes, self.addresses = processes, addresses
        self.public, self.engine = public, engine

    @property
    def address(self) -> str:
        """The public one."""
        return self.addresses[0]

    @property
    def pids(self) -> list[int]:
        """Of executor, engine and front end."""
        running = (self.processes.executor, self.processes.engine, *self.processes.frontends)
        return [process.pid for process in running]

    async def check_unharmed(self) -> None:
        """It serves as ever, and nothing is held any more."""
        answers = await asyncio.gather(*(self.public.generate([n, 7], 30) for n in range(4)))
        for number, answer in enumerate(answers):
            assert answer.code is grpc.StatusCode.OK, answer.details
            assert answer.token_ids == reference_output([number, 7], 30, _VOCAB_SIZE)
        shot = await self.engine.idle()
        assert shot.counters.num_recoveries == 0, "the executor was lost"
        for process in (self.processes.executor, self.processes.engine, *self.processes.frontends):
            assert process.num_starts == 1
            assert "Traceback" not in process.log(), process.log()[-3000:]


@contextlib.asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Target]:
    """Executor, engine and a front end that takes small requests only."""
    processes = Processes(
        directory,
        executor_flags=(
            *("--num-device-blocks", 400, "--block-size", 8, "--max-rows", 32),
            *("--vocab-size", _VOCAB_SIZE),
        ),
        engine_flags=("--strict",),
    )
    model = fake_model_dir(directory / "model", _VOCAB_SIZE)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    frontend, address = processes.add_frontend(model, "--max-request-bytes", MAX_REQUEST_BYTES)
    async with (
        running(processes),
        PublicClient(address) as public,
        EngineClient(processes.engine_address) as engine,
    ):
        await frontend.start()
        await public.serving()
        await engine.ready()
        addresses = [address, processes.engine_address, f"unix:{directory}/executor.sock"]
        yield Target(processes, addresses, public, engine)


async def attack(
    where: Target, num_requests: int, num_connections: int, num_slow: int, seed: int
) -> Outcome:
    """Send everything, while slow connections stay open. The same seed sends the same."""
    outcome = Outcome()
    slow = [asyncio.create_task(_drip(where.address)) for _ in range(num_slow)]
    async with grpc.aio.insecure_channel(where.address) as channel:
        sends = _calls(channel, outcome)
        names, weights = zip(*((name, weight) for name, (weight, _) in KINDS.items()), strict=True)

        async def call(number: int) -> None:
            rng = random.Random(f"request {seed} {number}")
            kind = rng.choices(names, weights)[0]
            await sends[number % len(sends)](kind, KINDS[kind][1](rng))

        await _at_once(call, num_requests, _NUM_IN_FLIGHT)

    async def connect(number: int) -> None:
        # The internal addresses too: a mistaken client must not bring them down.
        address = where.addresses[number % len(where.addresses)]
        kind, data = broken_stream(random.Random(f"connection {seed} {number}"))
        outcome.connections[kind, await _ending(address, data)] += 1

    await _at_once(connect, num_connections, _NUM_CONNECTIONS)
    for each in slow:
        each.cancel()
    ended = await asyncio.gather(*slow, return_exceptions=True)
    outcome.connections["slow", "held to the end"] += len(ended)
    return outcome


async def _at_once(do: Callable[[int], Awaitable[None]], count: int, at_once: int) -> None:
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await do(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())


def _calls(
    channel: grpc.aio.Channel, outcome: Outcome
) -> list[Callable[[str, bytes], Awaitable[None]]]:
    """A function for each method, which sends bytes and judges the answer."""
    stream: Any = channel.unary_stream(METHODS[0])
    unaries: list[Any] = [channel.unary_unary(method) for method in METHODS[1:]]

    async def note(kind: str, answer: Awaitable[None]) -> None:
        status, reason = "OK", ""
        try:
            await answer
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, _reason(error)
            if not reason and status not in _LIBRARY_STATUSES:
                outcome.untyped.append(f"{kind}: {status}: {error.details()}")
        outcome.requests[kind, status, reason] += 1

    async def read_all(data: bytes) -> None:
        async for _ in stream(data, timeout=_TIMEOUT_S):
            pass

    def by(send: Callable[[bytes], Awaitable[None]]) -> Callable[[str, bytes], Awaitable[None]]:
        return lambda kind, data: note(kind, send(data))

    async def once(unary: Any, data: bytes) -> None:
        await unary(data, timeout=_TIMEOUT_S)

    first, second = unaries
    return [by(read_all), by(lambda data: once(first, data)), by(lambda data: once(second, data))]


def _reason(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo.reason of the status; empty: it has none, or one that cannot be read."""
    trailers: Iterable[tuple[str, Any]] = error.trailing_metadata() or ()
    info = error_details_pb2.ErrorInfo()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            with contextlib.suppress(DecodeError):
                for detail in status_pb2.Status.FromString(value).details:
                    if detail.Unpack(info):
                        return str(info.reason)
    return ""


async def _ending(address: str, data: bytes) -> str:
    """Send bytes on a new connection; returns how that ended."""
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        num_bytes = 0
        while True:
            try:
                received = await asyncio.wait_for(reader.read(1 << 16), _ANSWER_S)
            except TimeoutError:
                return "still open" if num_bytes else "no answer"
            except ConnectionError:
                return "reset"
            if not received:
                return "closed"
            num_bytes += len(received)
    finally:
        writer.close()


async def _drip(address: str) -> None:
    """A call that arrives byte by byte and never as a whole."""
    _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    try:
        block = headers()
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        writer.write(len(block).to_bytes(3, "big") + b"\1\4\0\0\0\1" + block)
        writer.write((1 << 14).to_bytes(3, "big") + b"\0\1\0\0\0\1\0\0\0\x3f\xfb")
        while True:
            writer.write(b"\x0a")
            await writer.drain()
            await asyncio.sleep(_DRIP_S)
    finally:
        writer.close()

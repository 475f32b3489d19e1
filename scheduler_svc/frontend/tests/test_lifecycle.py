"""The process: flags, port clash, drain, signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc
from scheduler_svc.frontend.tests.calls import until
from scheduler_svc.frontend.tests.conftest import engine_state
from scheduler_svc.frontend.tests.fake_engine import FakeEngine, finished, unix_address
from scheduler_svc.frontend.tests.models import write_model_dir


class Process:
    """A front-end process and what it wrote to stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log += line.decode()

    async def wait(self) -> int:
        """The exit code, once the log is complete."""
        code = await asyncio.wait_for(self.process.wait(), 20)
        await asyncio.wait_for(self._reader, 20)
        return code

    async def port(self) -> int:
        """The port, once it serves and has found its engine."""
        await until(lambda: "engine ready" in self.log, 20)
        match = re.search(r"port=(\d+)", self.log)
        assert match is not None
        return int(match[1])


Start = Callable[..., Coroutine[Any, Any, Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    write_model_dir(tmp_path / "model")
    processes: list[Process] = []

    async def start_process(*flags: str, prefix: tuple[str, ...] = ()) -> Process:
        command = [*prefix, sys.executable, "-m", "scheduler_svc.frontend"]
        arguments = ["--engine", unix_address(tmp_path), "--model-dir", str(tmp_path / "model")]
        arguments += ["--lame-duck-s", "0"]
        process = await asyncio.create_subprocess_exec(
            *command, *arguments, *flags, stderr=asyncio.subprocess.PIPE
        )
        processes.append(Process(process))
        return processes[-1]

    yield start_process
    for process in processes:
        if process.process.returncode is None:
            process.process.kill()
        await process.wait()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(unix_address(tmp_path), engine_state())
    await engine.start()
    yield engine
    await engine.kill()


def stub_of(channel: grpc.aio.Channel) -> generate_pb2_grpc.GenerateServiceAsyncStub:
    stub: generate_pb2_grpc.GenerateServiceAsyncStub
    stub = generate_pb2_grpc.GenerateServiceStub(channel)
    return stub


async def test_drain_finishes_open_streams_and_refuses_new_ones(
    start: Start, engine: FakeEngine
) -> None:
    process = await start("--listen", "127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await process.port()}") as channel:
        stub = stub_of(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="a"))
        submit, _ = await engine.next_submit()
        await engine.send_tokens(submit.request_id, [50])
        await call.read()
        process.process.send_signal(signal.SIGTERM)
        await until(lambda: "draining" in process.log)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GenerateUnary(pb.GenerateRequest(prompt="a"))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert process.process.returncode is None
        await engine.send_tokens(submit.request_id, [51], finished("LENGTH"))
        last = await call.read()
        assert isinstance(last, pb.GenerateResponse)
        assert last.usage.output_tokens == 2
        assert await call.code() == grpc.StatusCode.OK
    assert await process.wait() == 0


async def test_drain_ends_what_outlives_the_grace(start: Start, engine: FakeEngine) -> None:
    process = await start("--listen", "127.0.0.1:0", "--drain-grace-s", "0.1")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await process.port()}") as channel:
        call = stub_of(channel).Generate(pb.GenerateRequest(prompt="a"))
        await engine.next_submit()
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(caught.value.details())
    assert await process.wait() == 0


async def test_second_signal_exits_at_once(start: Start, engine: FakeEngine) -> None:
    process = await start("--listen", "127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await process.port()}") as channel:
        call = stub_of(channel).Generate(pb.GenerateRequest(prompt="a"))
        await engine.next_submit()
        process.process.send_signal(signal.SIGTERM)
        await until(lambda: "draining" in process.log)
        begin = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert await process.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 2
        call.cancel()


async def test_port_in_use_is_one_line_and_code_2(start: Start) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process = await start("--listen", f"127.0.0.1:{holder.getsockname()[1]}")
        assert await process.wait() == 2
    errors = [line for line in process.log.splitlines() if " E frontend" in line]
    assert len(errors) == 1
    assert "is the port in use?" in errors[0]
    assert "Traceback" not in process.log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-buffered-tokens", "0"), "max_buffered_tokens"),
        (("--model-dir", "/nowhere"), "/nowhere: not a directory"),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
    ],
)
async def test_bad_settings_are_code_2(start: Start, flags: tuple[str, ...], message: str) -> None:
    process = await start(*flags)
    assert await process.wait() == 2
    assert message in process.log
    assert "Traceback" not in process.log


async def test_dies_with_its_parent(start: Start, engine: FakeEngine) -> None:
    # The shell stays the parent because a command follows.
    shell = ("/bin/sh", "-c", '"$@"; true', "sh")
    parent = await start("--listen", "127.0.0.1:0", "--exit-with-parent", prefix=shell)
    await parent.port()
    child = only_child(parent.process.pid)
    parent.process.kill()
    try:
        # The child holds the pipe of the log, which ends only when the child is gone.
        assert await parent.wait() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def test_reflection_lists_the_services(start: Start, engine: FakeEngine) -> None:
    process = await start("--listen", "127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await process.port()}") as channel:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for data in method(iter([request.SerializeToString()])):
            response = reflection_pb2.ServerReflectionResponse.FromString(data)
            names = {service.name for service in response.list_services_response.service}
            assert {"blockyard.v1.GenerateService", "grpc.health.v1.Health"} <= names
            return
    pytest.fail("no answer")

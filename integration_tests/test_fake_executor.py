"""The executor as a process: start, addresses, signals, restarts, the launcher's death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from executor_svc.tests.plans import decode_same, prefill
from integration_tests.reference import reference_output

PROMPT = [3, 1, 4, 1, 5]
ROOT = pathlib.Path(__file__).parent.parent
START_TIMEOUT_S = 30
Call = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]


class Process:
    """A fake executor of its own, and its log lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def ready(self) -> None:
        while "ready" not in (self.lines or [""])[-1]:
            await self.read_line()

    async def read_line(self) -> None:
        assert self.process.stderr is not None
        line = await asyncio.wait_for(self.process.stderr.readline(), START_TIMEOUT_S)
        assert line, self.lines
        self.lines.append(line.decode())

    async def exit_code(self) -> int:
        _, errors = await asyncio.wait_for(self.process.communicate(), START_TIMEOUT_S)
        self.lines += errors.decode().splitlines()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def running(address: str, *flags: str) -> AsyncIterator[Process]:
    command = (sys.executable, "-m", "integration_tests.fake_executor", "--listen", address)
    process = await asyncio.create_subprocess_exec(
        *command, *flags, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def connected(address: str, epoch: int = 0) -> AsyncIterator[tuple[Call, pb.Opened]]:
    async with grpc.aio.insecure_channel(address, LINK_OPTIONS) as channel:
        call: Call = pb_grpc.ExecutorServiceStub(channel).Run(wait_for_ready=True)
        opening = pb.Open(protocol_version=EXECUTOR_PROTOCOL_VERSION, scheduler_id=1, epoch=epoch)
        await call.write(pb.RunRequest(open=opening))
        yield call, (await read(call)).opened


async def read(call: Call) -> pb.RunResponse:
    while True:
        frame = await asyncio.wait_for(call.read(), START_TIMEOUT_S)
        assert isinstance(frame, pb.RunResponse), frame
        if not frame.HasField("heartbeat"):
            return frame


async def tokens(call: Call, epoch: int, count: int) -> list[int]:
    """Two plans are under way at a time."""
    found = []
    await call.write(pb.RunRequest(plan=prefill(1, epoch, 0, PROMPT, [1, 2])))
    for step_id in range(2, count + 2):
        if step_id <= count:
            await call.write(pb.RunRequest(plan=decode_same(step_id, epoch)))
        found.append((await read(call)).result.token_ids[0])
    return found


@pytest.fixture
def address(tmp_path: pathlib.Path) -> str:
    return f"unix:{tmp_path}/executor.sock"


async def test_serves_over_a_stale_socket_and_ends_cleanly(address: str) -> None:
    path = address.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with running(address, "--busy-ms", "1", "--step-ms", "2") as process:
        await process.ready()
        async with grpc.aio.insecure_channel(address) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            service = "blockyard.executor.v1.ExecutorService"
            answer = await check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with connected(address) as (call, opened):
            assert await tokens(call, opened.epoch, 4) == reference_output(PROMPT, 4, 1000)
            process.process.send_signal(signal.SIGTERM)
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await process.exit_code() == 0
    assert not socket_exists(path)


async def test_an_address_in_use_is_one_clear_line(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as live, socket.socket() as port:
        live.bind(address.removeprefix("unix:"))
        live.listen()
        port.bind(("127.0.0.1", 0))
        port.listen()
        taken = (address, f"127.0.0.1:{port.getsockname()[1]}", "unix:/no/such/place")
        for target in taken:
            async with running(target) as process:
                assert await process.exit_code() == 2
                [line] = [line for line in process.lines if " E executor: " in line]
                assert target in line
                assert "Traceback" not in "".join(process.lines)


async def test_killed_and_started_again(address: str) -> None:
    epochs: list[int] = []
    for _ in range(2):
        async with running(address) as process:
            async with connected(address, epoch=max(epochs, default=0)) as (call, opened):
                epochs.append(opened.epoch)
                assert opened.applied_step_id == 0
                assert await tokens(call, opened.epoch, 2) == reference_output(PROMPT, 2, 1000)
                process.process.kill()
            await process.exit_code()
    assert epochs[0] < epochs[1]


async def test_a_lost_device_ends_the_process(address: str) -> None:
    async with running(address, "--fatal-at", "2") as process:
        async with connected(address) as (call, opened):
            await call.write(pb.RunRequest(plan=prefill(1, opened.epoch, 0, PROMPT, [1, 2])))
            await call.write(pb.RunRequest(plan=decode_same(2, opened.epoch)))
            assert (await read(call)).HasField("result")
            assert "lose the device" in (await read(call)).fault.message
        assert await process.exit_code() == 1
    assert sum("device lost" in line for line in process.lines) == 1
    assert "Traceback" not in "".join(process.lines)


async def test_dies_with_its_parent(address: str) -> None:
    parent = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'integration_tests.fake_executor',"
        f" '--listen', '{address}', '--exit-with-parent'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", parent),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S))
    async with connected(address):
        process.kill()
        await process.wait()
        deadline = time.monotonic() + 5
        while is_running(pid):
            assert time.monotonic() < deadline, "it outlived its parent"
            await asyncio.sleep(0.02)


def socket_exists(path: str) -> bool:
    return pathlib.Path(path).exists()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"

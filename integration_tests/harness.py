"""Engines, executors and front ends for tests: as processes of their own, or inside the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc.aio

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2_grpc
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, RunnerInfo, StepBatch
from executor_svc.server import ExecutorServer
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.service import EngineServicer
from scheduler_svc.frontend.tests.models import write_model_dir

FAKE_DIGEST: Final = "fake"
"""Of the fake runner's model."""
_STOP_TIMEOUT_S: Final = 5.0


def module_command(module: str, flags: Sequence[object]) -> list[object]:
    """How to run one of our services; it dies with the test."""
    return [sys.executable, "-m", module, *flags, "--exit-with-parent"]


class Process:
    """A program that runs as a process; its output goes to a file."""

    def __init__(self, directory: Path, name: str, command: Sequence[object]) -> None:
        """Nothing is started yet; the words of `command` are passed as text."""
        self.log_path = directory / f"{name}.log"
        self.num_starts = 0
        self._command = [str(word) for word in command]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the process started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, or start it again."""
        self.num_starts += 1
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Kill it and start it again at once."""
        await self.kill()
        await self.start()

    def pause(self) -> None:
        """SIGSTOP: it lives, but does nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    async def stop(self) -> int:
        """SIGTERM, or SIGKILL if that takes too long; returns the exit code."""
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                return await self._end(signal.SIGTERM)
        except TimeoutError:
            return await self._end(signal.SIGKILL)

    async def exit_code(self) -> int:
        """Wait until it ends by itself."""
        assert self._process is not None
        return await self._process.wait()

    def log(self) -> str:
        """Everything it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    async def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await self._process.wait()


class Processes:
    """An engine and a fake executor as processes, and front ends on demand."""

    def __init__(
        self,
        directory: Path,
        *,
        executor_flags: Sequence[object] = (),
        engine_flags: Sequence[object] = (),
    ) -> None:
        """Nothing is started yet; flags come after the addresses."""
        self._directory = directory
        self.engine_address = f"unix:{directory}/engine.sock"
        executor_address = f"unix:{directory}/executor.sock"
        self.executor = Process(
            directory,
            "executor",
            module_command(
                "integration_tests.fake_executor", ["--listen", executor_address, *executor_flags]
            ),
        )
        self.engine = Process(
            directory,
            "engine",
            module_command(
                "scheduler_svc.engine",
                ["--listen", self.engine_address, "--executor", executor_address, *engine_flags],
            ),
        )
        self.frontends: list[Process] = []

    def add_frontend(
        self, model_path: Path, *more_flags: object, listen: str = ""
    ) -> tuple[Process, str]:
        """A front end that is not started yet, and its address; without `listen` a socket file."""
        address = listen or f"unix:{self._directory}/frontend{len(self.frontends)}.sock"
        flags = ["--engine", self.engine_address, "--listen", address, "--model-dir", model_path]
        flags += more_flags
        name = f"frontend{len(self.frontends)}"
        command = module_command("scheduler_svc.frontend", flags)
        self.frontends.append(Process(self._directory, name, command))
        return self.frontends[-1], address

    async def stop(self) -> None:
        """Kill whatever runs."""
        for process in (*self.frontends, self.engine, self.executor):
            await process.kill()


@contextlib.asynccontextmanager
async def running(processes: Processes) -> AsyncIterator[Processes]:
    """Start executor and engine; kill everything at the end, and show logs of a failure."""
    try:
        await processes.executor.start()
        await processes.engine.start()
        yield processes
    finally:
        await processes.stop()


def fake_model_dir(path: Path, vocab_size: int = 1000) -> Path:
    """A model directory whose digest is the fake runner's, so that front ends accept it."""
    write_model_dir(path, vocab_size=vocab_size, max_position_embeddings=4096)
    manifest = {"format_version": 1, "name": "fake", "digest": FAKE_DIGEST, "source": "test"}
    (path / "blockyard.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


class RecordingRunner(FakeRunner):
    """Keeps the plans that reached it, and lets a test hold the next ones back."""

    def __init__(self, info: RunnerInfo, options: FakeOptions | None = None) -> None:
        """As FakeRunner."""
        super().__init__(info, options)
        self.plans: list[Plan] = []
        self.gate = threading.Event()
        """Launches wait while it is clear."""
        self.gate.set()

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch."""
        self.plans.append(plan)
        self.gate.wait()
        return super().launch(plan, state, batch)


@contextlib.asynccontextmanager
async def executor_in_process(runner: FakeRunner, address: str) -> AsyncIterator[ExecutorServer]:
    """The real executor service around `runner`, on the test's own loop."""
    server = ExecutorServer(runner, address)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def engine_in_process(listen: str, executor: str, **settings: Any) -> AsyncIterator[Engine]:
    """The real engine and its service, on the test's own loop; a rejected plan fails the test."""
    settings = {"strict": True, **settings}
    engine = Engine(EngineSettings(listen=listen, executor=executor, **settings))
    server = grpc.aio.server(options=LINK_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(engine), server)
    server.add_insecure_port(listen)
    await server.start()
    link = asyncio.create_task(engine.run())
    owner = asyncio.current_task()
    assert owner is not None
    # Only a bug ends the link; the test must not go on waiting for what will never come.
    link.add_done_callback(lambda task: task.cancelled() or owner.cancel())
    try:
        yield engine
    except asyncio.CancelledError:
        if not link.done():
            raise
        owner.uncancel()
        link.result()
    finally:
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)
        await server.stop(None)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once `condition()` holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, not only events
            await asyncio.sleep(0.005)

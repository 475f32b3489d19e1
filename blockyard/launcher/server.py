"""A whole local server, for `blockyard serve`, tests and benchmarks."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from blockyard.launcher.child import Child, ChildSpec, LineSink, ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.run_dir import create_run_dir, service_address
from blockyard.launcher.watch import wait_until_serving, watch_executor
from blockyard.models import store
from blockyard.models.errors import ModelImportError

# Front ends give open streams 30 s to finish.
_FRONTEND_GRACE_S: Final = 40.0
_SERVICE_GRACE_S: Final = 10.0
_WILDCARD_HOSTS: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}

log = logging.getLogger(__name__)


class LocalServer:
    """Executor, engine and front ends as child processes of this one.

        async with LocalServer(ServeSettings(listen="127.0.0.1:0")) as server:
            client = AsyncClient(server.address)

    Entering returns once the API serves; children that die are restarted until the exit, which
    ends them in order. Needs a running event loop. Raises ServeError.
    """

    def __init__(self, settings: ServeSettings, sink: LineSink | None = None) -> None:
        """`sink` takes the children's output lines; None: they are kept for errors only."""
        self.settings = settings
        self.ready_s = 0.0
        """From the start until the API served [s]."""
        self._sink = sink or (lambda _name, _line: None)
        self._is_up = False
        self._children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._port: socket.socket | None = None
        self._address = settings.listen
        self._run_dir: Path | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """host:port that clients connect to."""
        host, _, port = self._address.rpartition(":")
        return f"{_WILDCARD_HOSTS.get(host, host)}:{port}"

    @property
    def engine_address(self) -> str:
        """gRPC target of the engine, for snapshots."""
        assert self._run_dir is not None, "not started"
        return service_address(self._run_dir, "engine")

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: executor, engine, frontend (frontend-0, ... if several)."""
        pids = {name: child.pid for name, child in self._children.items()}
        return {name: pid for name, pid in pids.items() if pid is not None}

    async def start(self) -> None:
        """Start all children at once; returns when the API serves. Raises ServeError."""
        begin = time.monotonic()
        try:
            model_path = await asyncio.to_thread(store.resolve, self.settings.model)
        except ModelImportError as error:
            raise ServeError(str(error), 2) from error
        self._run_dir = create_run_dir()
        self._reserve_port()
        for spec in child_specs(self.settings, model_path, self._run_dir, self._address):
            self._children[spec.name] = Child(spec, self._sink, lambda: self._is_up)
        self._tasks = [child.start() for child in self._children.values()]
        watching = watch_executor(self.engine_address, self._children["executor"].replace)
        self._tasks.append(asyncio.create_task(watching))
        serving = asyncio.create_task(wait_until_serving(self.address))
        try:
            await self._first_of(serving)
        finally:
            serving.cancel()
        self._is_up = True
        self.ready_s = time.monotonic() - begin

    async def wait(self) -> None:
        """Wait until the server cannot go on, which raises ServeError."""
        await self._first_of(*self._tasks)

    async def stop(self) -> None:
        """End the front ends (their streams finish), then the engine, then the executor."""
        children = list(self._children.values())
        frontends = [child for child in children if child.spec.name.startswith("frontend")]
        services = [child for child in reversed(children) if child not in frontends]
        await asyncio.gather(*(child.stop() for child in frontends))
        for child in services:
            await child.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._port is not None:
            self._port.close()
        if self._run_dir is not None:
            await asyncio.to_thread(shutil.rmtree, self._run_dir, ignore_errors=True)

    def kill(self) -> None:
        """Kill all children now; a `stop` under way then returns."""
        for child in self._children.values():
            child.kill()

    async def _first_of(self, *goals: asyncio.Task[None]) -> None:
        """Wait for one of `goals`, or for a child's failure, which is raised."""
        await asyncio.wait({*goals, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in (*self._tasks, *goals):
            if task.done():
                task.result()

    def _reserve_port(self) -> None:
        """Choose the port if none was given; refuse one that somebody else listens on.

        The socket is bound but never listens, so the front ends may bind the same port.
        """
        host, _, port = self.settings.listen.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        self._port = socket.socket(family, socket.SOCK_STREAM)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._port.bind((host.strip("[]"), int(port)))
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"cannot listen on {self.settings.listen} ({reason}); choose another --listen"
            raise ServeError(message, 2) from error
        self._address = f"{host}:{self._port.getsockname()[1]}"


def child_specs(
    settings: ServeSettings, model_path: Path, run_dir: Path, address: str
) -> list[ChildSpec]:
    """The commands of executor, engine and front ends, in the order they are started."""
    executor, engine = (service_address(run_dir, name) for name in ("executor", "engine"))
    common = [
        "--exit-with-parent",
        *("--log-format", settings.log_format),
        *("--log-level", settings.log_level),
    ]
    tracing = _given(
        otlp_endpoint=settings.otlp_endpoint or None,
        trace_sample_ratio=settings.trace_sample_ratio,
    )
    limits = _given(
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
    )
    executor_flags = [
        *("--listen", executor, "--model-dir", str(model_path)),
        *("--block-size", str(settings.block_size)),
        *_given(
            device=None if settings.device == "auto" else settings.device,
            load_format=None if settings.load_format == "auto" else settings.load_format,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_memory=settings.kv_memory,
            max_rows=settings.max_num_seqs,
            num_threads=settings.num_threads,
            host_memory=settings.host_memory,
        ),
        *limits,
    ]
    engine_flags = [
        *("--listen", engine, "--executor", executor, "--window", str(settings.window)),
        *_given(
            max_num_seqs=settings.max_num_seqs,
            metrics_address=settings.metrics_address or None,
            plan_log=settings.plan_log,
            preemption=settings.preemption,
        ),
        *("--model-dir", str(model_path)),
        *(() if settings.prefix_cache else ("--no-prefix-cache",)),
        *limits,
        *tracing,
    ]
    frontend_flags = [
        *("--engine", engine, "--listen", address, "--model-dir", str(model_path)),
        *tracing,
    ]
    if settings.frontends > 1:
        frontend_flags.append("--reuse-port")
    specs = [
        _spec("executor", "executor_svc", [*executor_flags, *common], _SERVICE_GRACE_S),
        _spec("engine", "scheduler_svc.engine", [*engine_flags, *common], _SERVICE_GRACE_S),
    ]
    for index in range(settings.frontends):
        name = "frontend" if settings.frontends == 1 else f"frontend-{index}"
        flags = [*frontend_flags, *common]
        specs.append(_spec(name, "scheduler_svc.frontend", flags, _FRONTEND_GRACE_S))
    return specs


def _given(**values: float | str | Path | None) -> list[str]:
    """Flags for what is set."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def _spec(name: str, module: str, flags: list[str], grace_s: float) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-m", module, *flags), grace_s)

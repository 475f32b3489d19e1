"""A whole local server, for `blockyard serve`, tests and benchmarks."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from blockyard.launcher.child import Child, ChildSpec, LineSink, ServeError
from blockyard.launcher.commands import frontend_spec, service_specs
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.frontends import Frontends
from blockyard.launcher.run_dir import create_run_dir, service_address
from blockyard.launcher.watch import watch_executor
from blockyard.models import store
from blockyard.models.errors import ModelImportError

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
        self._services: dict[str, Child] = {}
        self._frontends: Frontends | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] | None = None  # why the server cannot go on
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
        frontends = [] if self._frontends is None else self._frontends.current
        children = [*self._services.values(), *frontends]
        return {child.spec.name: child.pid for child in children if child.pid is not None}

    async def start(self) -> None:
        """Start all children at once; returns when the API serves. Raises ServeError."""
        begin = time.monotonic()
        try:
            model_path = await asyncio.to_thread(store.resolve, self.settings.model)
        except ModelImportError as error:
            raise ServeError(str(error), 2) from error
        run_dir = self._run_dir = create_run_dir()
        self._reserve_port()
        self._failure = asyncio.get_running_loop().create_future()
        for spec in service_specs(self.settings, model_path, run_dir):
            child = self._services[spec.name] = Child(spec, self._sink, lambda: self._is_up)
            self._watch(child.start())
        watching = watch_executor(self.engine_address, self._services["executor"].replace)
        self._watch(asyncio.create_task(watching))

        def make_spec(index: int, admin: str) -> ChildSpec:
            return frontend_spec(self.settings, model_path, run_dir, self._address, admin, index)

        self._frontends = Frontends(
            self.settings.frontends, make_spec, run_dir, self._sink, self._watch
        )
        serving = asyncio.create_task(self._frontends.start())
        self._tasks.append(serving)
        await asyncio.wait([serving, self._failure], return_when=asyncio.FIRST_COMPLETED)
        (serving if serving.done() else self._failure).result()
        self._is_up = True
        self.ready_s = time.monotonic() - begin

    async def wait(self) -> None:
        """Wait until the server cannot go on, which raises ServeError."""
        assert self._failure is not None, "not started"
        await asyncio.wait([self._failure])
        self._failure.result()

    async def roll(self) -> None:
        """Replace the front ends one by one; no request fails, streams finish.

        Does nothing before the API serves. Raises ServeError if a new one cannot serve; the old
        ones then go on.
        """
        if self._is_up and self._frontends is not None:
            await self._frontends.roll()

    async def stop(self) -> None:
        """End the front ends (their streams finish), then the engine, then the executor."""
        if self._frontends is not None:
            await self._frontends.stop()
        for child in reversed(self._services.values()):
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
        if self._frontends is not None:
            self._frontends.kill()
        for child in self._services.values():
            child.kill()

    def _watch(self, task: asyncio.Task[None]) -> None:
        """What `task` fails with is why the server cannot go on; the first failure counts."""
        failure = self._failure
        assert failure is not None

        def note(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not failure.done():
                failure.set_exception(error)
                failure.exception()  # seen, whether or not somebody waits

        task.add_done_callback(note)
        self._tasks.append(task)

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

"""The front ends of a local server: started together, replaced one by one, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from blockyard.launcher.child import Child, ChildSpec, LineSink
from blockyard.launcher.run_dir import service_address
from blockyard.launcher.watch import wait_until_serving

SpecMaker = Callable[[int, str], ChildSpec]
"""Makes the spec of front end number i, given the address that it is asked for its health at."""


class Frontends:
    """Processes that share the public port. Children that die are restarted."""

    def __init__(
        self,
        count: int,
        make_spec: SpecMaker,
        run_dir: Path,
        sink: LineSink,
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """Nothing runs before `start`.

        Args:
            count: how many.
            make_spec: how to run one.
            run_dir: for their sockets.
            sink: takes their output lines.
            watch: given the task of each that came to serve; an error of it ends the server.
        """
        self._count = count
        self._make_spec = make_spec
        self._run_dir = run_dir
        self._sink = sink
        self._watch = watch
        self._current: dict[int, Child] = {}
        self._running: set[Child] = set()  # the current ones, one that comes, one that goes
        self._num_rolls = 0
        self._rolling = asyncio.Lock()
        self._is_stopping = False

    @property
    def current(self) -> list[Child]:
        """Those that serve, or try to."""
        return list(self._current.values())

    async def start(self) -> None:
        """Start all; returns when all serve. Raises ServeError."""
        await asyncio.gather(*(self._bring_up(index) for index in range(self._count)))

    async def roll(self) -> None:
        """Replace each: a new one serves before the old one is told to end.

        Raises ServeError if a new one cannot serve; it is given up, and the old ones go on.
        Returns early when all are stopped meanwhile.
        """
        async with self._rolling:
            self._num_rolls += 1
            for index, old in list(self._current.items()):
                await self._bring_up(index)
                await old.stop()
                self._running.discard(old)

    async def stop(self) -> None:
        """Let their streams finish, and end them all."""
        self._is_stopping = True
        await asyncio.gather(*(child.stop() for child in self._running))

    def kill(self) -> None:
        """End them now."""
        self._is_stopping = True
        for child in self._running:
            child.kill()

    async def _bring_up(self, index: int) -> None:
        """Start number `index`; returns when it serves, or when all are being stopped."""
        if self._is_stopping:
            return
        admin = service_address(self._run_dir, f"frontend-{index}.{self._num_rolls}")
        has_served = asyncio.Event()
        child = Child(self._make_spec(index, admin), self._sink, has_served.is_set)
        self._running.add(child)
        if index not in self._current:
            self._current[index] = child
        task = child.start()
        serving = asyncio.create_task(wait_until_serving(admin))
        try:
            await asyncio.wait([task, serving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
        if task.done():
            self._running.discard(child)
            task.result()  # raises what it failed with; without that, it was stopped
            return
        has_served.set()
        self._current[index] = child
        self._watch(task)

"""A proxy between two unix sockets that can cut, stall and delay what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_CHUNK_BYTES: Final = 1 << 16


class UdsProxy:
    """Listens on `path` and forwards every connection to `upstream`; use as a context manager."""

    def __init__(self, path: Path, upstream: Path) -> None:
        """Nothing listens before the context is entered."""
        self.address = f"unix:{path}"
        self.delay_s = 0.0
        """How long each piece of data is held back, both ways."""
        self.num_connections = 0
        self._path = path
        self._upstream = upstream
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection now; what is under way is lost. New ones are accepted."""
        for task in self._connections:
            task.cancel()

    def stall(self) -> None:
        """Let nothing pass until `resume`; connections stay open."""
        self._flowing.clear()

    def resume(self) -> None:
        """Let data pass again."""
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.num_connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        try:
            async with asyncio.TaskGroup() as group:
                directions = [
                    group.create_task(self._copy(reader, up_writer)),
                    group.create_task(self._copy(up_reader, writer)),
                ]
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                for direction in directions:
                    direction.cancel()
        finally:
            up_writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()

"""GET /metrics over HTTP, on the engine's own loop. Whatever is asked of it, serving goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from blockyard.common.listen_address import split_host_port
from blockyard.common.logs import event
from scheduler_svc.engine.metrics.exposition import Format, choose_format, render
from scheduler_svc.engine.metrics.reading import MetricsSource

_MAX_HEAD_BYTES: Final = 8192
_MAX_CONNECTIONS: Final = 32
_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 5.0
"""For an address that cannot be listened on."""

log = logging.getLogger(__name__)


class MetricsServer:
    """Answers scrapes from one source."""

    def __init__(self, source: MetricsSource, address: str) -> None:
        """Listen on `address`, host:port, once it runs; port 0 picks a free one.

        `source` is read on that loop only. Raises ValueError if the address is malformed.
        """
        self.bound_address = ""
        """host:port while it listens."""
        self._source = source
        self._address = address
        self._host, self._port = split_host_port(address)
        self._num_connections = 0
        self._rendering = asyncio.Lock()

    async def run(self) -> None:
        """Answer until cancelled.

        If the address cannot be listened on, that is logged, and tried again: serving is worth
        more than being watched.
        """
        is_reported = False
        while True:
            try:
                server = await asyncio.start_server(
                    self._answer, self._host, self._port, limit=_MAX_HEAD_BYTES
                )
                break
            except (OSError, UnicodeError) as error:  # UnicodeError: the host cannot be a name
                if not is_reported:
                    log.error(
                        "metrics: cannot listen on %s (%s); serving without, and trying again. "
                        "Another --metrics-address may be free",
                        *(self._address, error),
                    )
                is_reported = True
            await asyncio.sleep(_RETRY_S)
        port = server.sockets[0].getsockname()[1]
        self.bound_address = f"{self._address.rpartition(':')[0]}:{port}"
        event(log, "metrics are up", url=f"http://{self.bound_address}/metrics")
        try:
            await server.serve_forever()
        finally:
            self.bound_address = ""
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; a peer that is slow or goes away loses its answer."""
        if self._num_connections == _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._num_connections += 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                writer.write(await self._response(reader))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._num_connections -= 1
            writer.transport.abort()  # whatever it has not taken

    async def _response(self, reader: asyncio.StreamReader) -> bytes:
        """Read one request's head; the whole answer to it."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return _http("400 Bad Request", b"not an HTTP request\n")
        request_line, *headers = head.decode("latin-1").split("\r\n")
        match request_line.split(" "):
            case [method, target, version] if version.startswith("HTTP/1."):
                if target.partition("?")[0] != "/metrics":
                    return _http("404 Not Found", b"the metrics are at /metrics\n")
                if method != "GET":
                    return _http("405 Method Not Allowed", b"use GET\n", headers="Allow: GET\r\n")
                chosen = choose_format(_value_of("accept", headers))
                async with self._rendering:  # one after another, however many ask
                    body = await render(self._source, chosen)
                return _http("200 OK", body, chosen.value)
        return _http("400 Bad Request", b"not an HTTP request\n")


@contextlib.asynccontextmanager
async def serve_metrics(source: MetricsSource, address: str) -> AsyncIterator[MetricsServer]:
    """Run a MetricsServer until the exit. Raises ValueError if `address` is malformed."""
    server = MetricsServer(source, address)
    running = asyncio.create_task(server.run())
    try:
        yield server
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _value_of(name: str, headers: list[str]) -> str:
    """All values of a header, as one list."""
    found = (header.partition(":") for header in headers)
    return ",".join(value for key, _, value in found if key.strip().lower() == name)


def _http(
    status: str, body: bytes, content_type: str = Format.TEXT.value, *, headers: str = ""
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    )
    return head.encode() + body

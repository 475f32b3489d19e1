"""grpc.health.v1 for engine and front ends: liveness, readiness and progress apart.

The packaged servicer loses watchers of a name when another watcher of it leaves, and turns every
name off at shutdown, liveness included; this one does neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

LIVENESS: Final = "liveness"
"""Always SERVING: a process that waits for its peer, or drains, must not be killed."""

PROGRESS: Final = "progress"
"""SERVING while the process is ready and the executor gets on with the work there is."""

_STATUS: Final = {
    True: pb.HealthCheckResponse.SERVING,
    False: pb.HealthCheckResponse.NOT_SERVING,
    None: pb.HealthCheckResponse.SERVICE_UNKNOWN,
}

_Context = grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse]


class HealthServicer(pb_grpc.HealthServicer):
    """Serving status of "" and the given services (readiness), `liveness` and `progress`."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(["", *services])
        self._is_ready = False
        self._is_progressing = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def update(self, *, is_ready: bool, is_progressing: bool) -> None:
        """Set what the names but `liveness` say; nobody progresses who is not ready."""
        self._is_ready = is_ready
        self._is_progressing = is_ready and is_progressing
        self._wake_watchers()

    def close(self) -> None:
        """End all watches, which would otherwise hold up the server's stop."""
        self._is_closed = True
        self._wake_watchers()

    async def Check(
        self, request: pb.HealthCheckRequest, context: _Context
    ) -> pb.HealthCheckResponse:
        """The current status. NOT_FOUND: an unknown name."""
        is_serving = self._is_serving(request.service)
        if is_serving is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return pb.HealthCheckResponse(status=_STATUS[is_serving])

    async def Watch(
        self, request: pb.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The current status, then every change of it."""
        last = None
        while not self._is_closed:
            changed = self._changed
            status = _STATUS[self._is_serving(request.service)]
            if status != last:
                yield pb.HealthCheckResponse(status=status)
                last = status
            await changed.wait()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _is_serving(self, service: str) -> bool | None:
        """None: a name that nobody knows."""
        if service == LIVENESS:
            return True
        if service == PROGRESS:
            return self._is_progressing
        return self._is_ready if service in self._services else None

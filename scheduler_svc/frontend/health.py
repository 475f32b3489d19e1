"""grpc.health.v1 for a front end.

The packaged servicer loses watchers of a name when another watcher of it leaves, and turns every
name off at shutdown, liveness included; this one does neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

LIVENESS: Final = "liveness"
"""Always SERVING: a front end that waits for its engine, or drains, must not be killed."""

_Context = grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse]


class HealthServicer(pb_grpc.HealthServicer):
    """Serving status of "", the given services, and `liveness`."""

    def __init__(self, services: list[str]) -> None:
        self._names = frozenset(["", *services])
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, is_serving: bool) -> None:
        """Set the status of every name but `liveness`."""
        self._is_serving = is_serving
        self._wake_watchers()

    def close(self) -> None:
        """End all watches, which would otherwise hold up the server's stop."""
        self._is_closed = True
        self._wake_watchers()

    async def Check(
        self, request: pb.HealthCheckRequest, context: _Context
    ) -> pb.HealthCheckResponse:
        """The current status. NOT_FOUND: an unknown name."""
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return pb.HealthCheckResponse(status=status)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The current status, then every change of it."""
        last = None
        while not self._is_closed:
            changed = self._changed
            status = self._status(request.service) or pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                yield pb.HealthCheckResponse(status=status)
                last = status
            await changed.wait()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> int | None:
        if service == LIVENESS or (service in self._names and self._is_serving):
            return pb.HealthCheckResponse.SERVING
        return pb.HealthCheckResponse.NOT_SERVING if service in self._names else None

"""What the launcher learns over gRPC: whether the API serves, and how the executor does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2, engine_pb2_grpc
from blockyard.launcher.child import ServeError

_POLL_S: Final = 0.05
_CHECK_TIMEOUT_S: Final = 2.0
_RETRY_S: Final = 0.2

log = logging.getLogger(__name__)

State = engine_pb2.WatchExecutorResponse.State


async def wait_until_serving(address: str) -> None:
    """Return once the server at `address` says SERVING (for its "" service)."""
    async with grpc.aio.insecure_channel(address, options=LINK_OPTIONS) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        while True:
            request = health_pb2.HealthCheckRequest()
            try:
                answer = await check(request, timeout=_CHECK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                pass  # not listening yet
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_S)


async def watch_executor(engine_address: str, replace_executor: Callable[[], None]) -> None:
    """Follow the engine's view of the executor for ever, through engine restarts.

    Calls `replace_executor` each time the executor becomes unresponsive. Raises ServeError if it
    is not one that the engine can use.
    """
    async with grpc.aio.insecure_channel(engine_address, options=LINK_OPTIONS) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        while True:
            try:
                async for update in stub.WatchExecutor(engine_pb2.WatchExecutorRequest()):
                    _act_on(update, replace_executor)
            except grpc.aio.AioRpcError as error:
                log.debug("no engine to watch: %s", error.details())
            await asyncio.sleep(_RETRY_S)


def _act_on(update: engine_pb2.WatchExecutorResponse, replace_executor: Callable[[], None]) -> None:
    if update.state == State.STATE_UNRESPONSIVE:
        log.warning("executor is unresponsive (%s): replacing it", update.message)
        replace_executor()
    elif update.state == State.STATE_INCOMPATIBLE:
        raise ServeError(f"the engine cannot use this executor: {update.message}", 2)

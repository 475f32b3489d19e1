from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from blockyard.engine.v1 import engine_pb2
from blockyard.launcher import watch
from blockyard.launcher.child import ServeError
from blockyard.launcher.watch import State


class _Engine:
    """Tells the next list of states to each watcher, then ends the stream."""

    def __init__(self, *streams: list[State.ValueType]) -> None:
        self._streams = list(streams)

    async def watch(
        self, request: engine_pb2.WatchExecutorRequest, context: Any
    ) -> AsyncIterator[engine_pb2.WatchExecutorResponse]:
        for state in self._streams.pop(0) if self._streams else []:
            yield engine_pb2.WatchExecutorResponse(state=state, message="because")

    def handler(self) -> grpc.GenericRpcHandler:
        method = grpc.unary_stream_rpc_method_handler(
            self.watch,
            request_deserializer=engine_pb2.WatchExecutorRequest.FromString,
            response_serializer=engine_pb2.WatchExecutorResponse.SerializeToString,
        )
        name = "blockyard.engine.v1.EngineService"
        return grpc.method_handlers_generic_handler(name, {"WatchExecutor": method})


async def test_an_unresponsive_executor_is_replaced_through_engine_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_RETRY_S", 0.01)
    address = f"unix:{tmp_path / 'engine.sock'}"
    replaced: list[int] = []
    watching = asyncio.create_task(watch.watch_executor(address, lambda: replaced.append(1)))
    await asyncio.sleep(0.05)  # no engine yet
    server = grpc.aio.server()
    engine = _Engine(
        [State.STATE_CONNECTING, State.STATE_READY, State.STATE_UNRESPONSIVE, State.STATE_READY],
        [State.STATE_READY, State.STATE_UNRESPONSIVE],
        [State.STATE_READY, State.STATE_INCOMPATIBLE],
    )
    server.add_generic_rpc_handlers((engine.handler(),))
    server.add_insecure_port(address)
    await server.start()
    with pytest.raises(ServeError, match="cannot use this executor: because") as caught:
        await asyncio.wait_for(watching, 10)
    assert caught.value.exit_code == 2
    assert len(replaced) == 2
    await server.stop(None)


async def test_waiting_for_a_server_that_starts_late() -> None:
    servicer = health.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    waiting = asyncio.create_task(watch.wait_until_serving(address))
    await server.start()
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    await asyncio.wait_for(waiting, 5)
    await server.stop(None)

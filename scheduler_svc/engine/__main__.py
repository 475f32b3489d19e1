"""`python -m scheduler_svc.engine`: the engine process.

Exit codes: 0 stopped by a signal, 2 unusable settings or address.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys

import grpc
import uvloop
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2_grpc

from blockyard.common import logs
from blockyard.common.admin import admin_server
from blockyard.common.listen_address import ListenError
from blockyard.common.reloading import FileError
from blockyard.common.settings import run_service
from blockyard.common.shutdown import on_first_signal
from blockyard.engine.v1 import engine_pb2_grpc
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.metrics.server import serve_metrics
from scheduler_svc.engine.metrics.source import EngineMetricsSource
from scheduler_svc.engine.service import EngineServicer
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.plan_log import PlanLogPathError
from scheduler_svc.telemetry import export

logger = logging.getLogger("scheduler_svc.engine")


def _bind(engine: Engine, listen: str) -> grpc.aio.Server:
    server = engine.security.server(listen)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(engine), server)
    health_pb2_grpc.add_HealthServicer_to_server(engine.health, server)
    channelz.add_channelz_servicer(server)
    engine.security.bind(server, listen)
    return server


async def serve(settings: EngineSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ListenError, PlanLogPathError and FileError."""
    async with contextlib.AsyncExitStack() as stack:
        traces = export.begin(settings.otlp_endpoint)
        tracing = None
        if traces is not None:
            tracing = EngineTracing.to(traces, settings.trace_sample_ratio)
            stack.push_async_callback(asyncio.to_thread, traces.close)
        engine = Engine(settings, tracing)
        stack.callback(engine.close)
        if settings.metrics_address:
            source = EngineMetricsSource(engine)
            await stack.enter_async_context(serve_metrics(source, settings.metrics_address))
            watching = asyncio.create_task(source.lag.run())
            stack.callback(watching.cancel)
        await _serve(engine, settings)


async def _serve(engine: Engine, settings: EngineSettings) -> None:
    server = _bind(engine, settings.listen)
    admin = admin_server(engine.health, settings.admin)
    await server.start()
    await admin.start()
    stop = on_first_signal()
    logs.event(logger, "engine is up", listen=settings.listen, executor=settings.executor)
    gc.freeze()  # what start-up made lives as long as the process: do not walk it again
    link = asyncio.create_task(engine.run())
    stopped = asyncio.create_task(_until_done(engine, stop, settings.drain_grace_s))
    await asyncio.wait([link, stopped], return_when=asyncio.FIRST_COMPLETED)
    if link.done():
        link.result()  # raises: only a bug ends the link
    link.cancel()
    engine.health.close()
    await server.stop(grace=1.0)
    await admin.stop(0)


async def _until_done(engine: Engine, stop: asyncio.Event, grace_s: float) -> None:
    """Wait for the signal, and then for the front ends: they end after their last streams."""
    await stop.wait()
    await engine.until_left(grace_s)


def main(arguments: list[str]) -> int:
    """Run until stopped; returns the exit code."""

    def run(settings: EngineSettings) -> int:
        uvloop.run(serve(settings))
        return 0

    unusable = (ListenError, PlanLogPathError, FileError)
    return run_service("engine", EngineSettings, arguments, run, unusable)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m scheduler_svc.engine`: the engine process.

Exit codes: 0 stopped by a signal, 2 unusable settings or address.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys

import grpc
import uvloop
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health

from blockyard.common import logs
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.listen_address import ListenError, claim
from blockyard.common.settings import run_service
from blockyard.engine.v1 import engine_pb2_grpc
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.metrics import serve_metrics
from scheduler_svc.engine.service import EngineServicer
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.plan_log import PlanLogPathError
from scheduler_svc.telemetry import export

logger = logging.getLogger("scheduler_svc.engine")


def _bind(engine: Engine, listen: str) -> grpc.aio.Server:
    claim(listen)
    server = grpc.aio.server(options=LINK_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(engine), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    try:
        server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ListenError(f"{listen}: cannot listen there; is the port in use?") from error
    return server


async def serve(settings: EngineSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ListenError and PlanLogPathError."""
    async with contextlib.AsyncExitStack() as stack:
        traces = export.begin(settings.otlp_endpoint)
        tracing = None
        if traces is not None:
            tracing = EngineTracing.to(traces, settings.trace_sample_ratio)
            stack.push_async_callback(asyncio.to_thread, traces.close)
        engine = Engine(settings, tracing)
        stack.callback(engine.close)
        if settings.metrics_address:
            where = await stack.enter_async_context(serve_metrics(engine, settings.metrics_address))
            logs.event(logger, "metrics are up", url=f"http://{where}/metrics")
        await _serve(engine, settings)


async def _serve(engine: Engine, settings: EngineSettings) -> None:
    server = _bind(engine, settings.listen)
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logs.event(logger, "engine is up", listen=settings.listen, executor=settings.executor)
    gc.freeze()  # what start-up made lives as long as the process: do not walk it again
    link = asyncio.create_task(engine.client.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([link, stopped], return_when=asyncio.FIRST_COMPLETED)
    if link.done():
        link.result()  # raises: only a bug ends the link
    link.cancel()
    await server.stop(grace=1.0)


def main(arguments: list[str]) -> int:
    """Run until stopped; returns the exit code."""

    def run(settings: EngineSettings) -> int:
        uvloop.run(serve(settings))
        return 0

    return run_service("engine", EngineSettings, arguments, run, (ListenError, PlanLogPathError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m scheduler_svc.engine`: the engine process."""

from __future__ import annotations

import asyncio
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
from blockyard.common.process import exit_with_parent
from blockyard.engine.v1 import engine_pb2_grpc
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.service import EngineServicer

logger = logging.getLogger("scheduler_svc.engine")


async def serve(settings: EngineSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises RuntimeError if the address cannot be bound."""
    engine = Engine(settings)
    server = grpc.aio.server(options=LINK_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(engine), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.add_insecure_port(settings.listen)
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


def main() -> None:
    """Parse flags and run. Exit code 2: the address cannot be used."""
    settings = EngineSettings(_cli_parse_args=True)  # type: ignore[call-arg]  # pydantic's own
    logs.configure("engine", settings.log_format, settings.log_level)
    if settings.exit_with_parent:
        exit_with_parent()
    try:
        uvloop.run(serve(settings))
    except RuntimeError as error:
        logger.error("cannot listen on %s: %s", settings.listen, error)
        sys.exit(2)


if __name__ == "__main__":
    main()

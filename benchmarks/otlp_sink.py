"""A collector that forgets what it takes: `python -m benchmarks.otlp_sink ADDRESS`."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import grpc.aio
import uvloop


async def _take(data: bytes, context: Any) -> bytes:
    return b""  # an empty response: all was accepted


async def sink(address: str) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    handler: Any = grpc.unary_unary_rpc_method_handler(_take)
    server = grpc.aio.server()
    for signal_name in ("trace.v1.TraceService", "metrics.v1.MetricsService"):
        service = f"opentelemetry.proto.collector.{signal_name}"
        handlers = grpc.method_handlers_generic_handler(service, {"Export": handler})
        server.add_generic_rpc_handlers((handlers,))
    server.add_insecure_port(address)
    await server.start()
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(sink(sys.argv[1]))

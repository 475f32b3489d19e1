"""An executor's life: bind, serve, stop. Works with any runner; knows no model and no device."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Final

from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from blockyard.common import logs
from blockyard.common.admin import admin_server
from blockyard.common.link_security import PLAIN, LinkSecurity
from blockyard.common.shutdown import on_first_signal
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from executor_svc.runner import FatalDeviceError, Runner
from executor_svc.service import ExecutorServicer

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ExecutorService"].full_name
_STOP_GRACE_S: Final = 1.0

log = logging.getLogger(__name__)


class ExecutorServer:
    """A servicer, its health and its server. Build it inside the event loop that serves it."""

    def __init__(
        self, runner: Runner, listen: str, security: LinkSecurity = PLAIN, admin: str = ""
    ) -> None:
        """Bind the addresses; nothing is answered before `start`. Raises ListenError, FileError."""
        self.servicer = ExecutorServicer(runner)
        self._health = health.aio.HealthServicer()
        self._server = security.server(listen)
        pb_grpc.add_ExecutorServiceServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        self.port = security.bind(self._server, listen)
        self._admin = admin_server(self._health, admin)

    async def start(self) -> asyncio.Future[str]:
        """Serve; the future resolves with a message if the device is lost."""
        fatal = self.servicer.start()
        for name in ("", SERVICE_NAME, "liveness"):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        await self._admin.start()
        return fatal

    async def stop(self) -> None:
        """End the stream and finish the steps under way.

        The socket file stays: by now it may be a successor's, and `claim` removes dead ones.
        """
        await self._health.enter_graceful_shutdown()
        await self.servicer.stop()
        await self._server.stop(_STOP_GRACE_S)
        await self._admin.stop(0)


async def serve(
    runner: Runner,
    listen: str,
    drain_grace_s: float = 0.0,
    security: LinkSecurity = PLAIN,
    admin: str = "",
) -> None:
    """Serve `runner` until SIGTERM or SIGINT; a second signal exits at once.

    Args:
        runner: what computes.
        listen: unix:/path or host:port.
        drain_grace_s: after the signal, how long to go on for a scheduler that has not left [s].
        security: who may connect.
        admin: see LinkSettings.

    Raises ListenError, FileError, or FatalDeviceError when the device is lost.
    """
    server = ExecutorServer(runner, listen, security, admin)
    shutdown = on_first_signal()
    fatal = await server.start()
    gc.freeze()  # what loading made lives as long as the process: do not walk it again
    logs.event(log, "ready", address=listen, port=server.port, **_summary(runner))
    fatal.add_done_callback(lambda _: shutdown.set())
    await shutdown.wait()
    if not fatal.done():
        await server.servicer.until_left(drain_grace_s)
    await server.stop()
    if fatal.done():
        raise FatalDeviceError(fatal.result())


def _summary(runner: Runner) -> dict[str, str | int]:
    info = runner.info
    return {
        "model": info.model_name,
        "device": info.device,
        "device_blocks": info.num_device_blocks,
        "host_blocks": info.num_host_blocks,
        "block_size": info.block_size,
        "max_rows": info.max_rows,
        "max_model_len": info.max_model_len,
    }

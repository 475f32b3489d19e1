"""A front end's life: start, readiness, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import uuid
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blockyard.common.grpc_options import public_server_options
from blockyard.common.listen_address import ListenError, claim
from blockyard.common.logs import event
from blockyard.common.model_dir import ModelDir
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.common.version import software_version
from blockyard.engine.v1 import engine_pb2
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.api import SERVICE_NAME, GenerateApi
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.health import HealthServicer
from scheduler_svc.frontend.loop_lag import LoopLag
from scheduler_svc.frontend.tokenizer import PromptTokenizer
from scheduler_svc.frontend.tracing import SERVICE, RpcTracing
from scheduler_svc.telemetry import export

_STOP_GRACE_S: Final = 1.0
"""For the last statuses to leave."""

_LOOK_EVERY_S: Final = 1.0
"""For clients that do not read."""

log = logging.getLogger(__name__)


class Frontend:
    """The parts of one front end, wired. Build it inside the event loop that serves it."""

    def __init__(self, settings: FrontendSettings, model: ModelDir) -> None:
        """Bind and wire; nothing is served before `start`. Raises ListenError, ModelDirError."""
        self._settings = settings
        self._is_draining = False
        self._tokenizer = PromptTokenizer(model)
        self._lag = LoopLag()
        self._fanout = Fanout(self._lag)
        self._health = HealthServicer([SERVICE_NAME])
        hello = engine_pb2.Hello(
            protocol_version=ENGINE_PROTOCOL_VERSION,
            frontend_id=f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
            model_digest=model.digest,
        )
        self._link = EngineLink(settings.engine, hello, self._fanout, self._set_ready)
        self._traces = export.begin(settings.otlp_endpoint)
        tracer = None
        if self._traces is not None:
            tracer = self._traces.tracer(SERVICE, settings.trace_sample_ratio)
        self._api = GenerateApi(
            model,
            self._tokenizer,
            self._link,
            self._fanout,
            version=software_version(),
            max_buffered_tokens=settings.max_buffered_tokens,
            tracer=tracer,
        )
        self._server = grpc.aio.server(
            interceptors=[RpcTracing(tracer, SERVICE_NAME)] if tracer else None,
            options=public_server_options(
                settings.max_request_bytes, reuse_port=settings.reuse_port
            ),
        )
        self._server.add_generic_rpc_handlers((self._api.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection(
            (SERVICE_NAME, health_name, reflection.SERVICE_NAME), self._server
        )
        self.port = _bind(self._server, settings.listen)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self._link.state is not None and not self._is_draining

    async def start(self) -> None:
        """Serve; requests are refused with UNAVAILABLE until the engine is ready."""
        await self._server.start()
        runs = (self._link.run(), self._lag.run(), self._end_slow_readers())
        self._tasks = [asyncio.create_task(run) for run in runs]

    async def _end_slow_readers(self) -> None:
        limit_s = self._settings.slow_reader_timeout_s
        while True:
            await asyncio.sleep(min(_LOOK_EVERY_S, limit_s / 4))
            self._link.stop(self._fanout.end_stalled(limit_s))

    async def run(self, shutdown: asyncio.Event) -> None:
        """Serve until `shutdown` is set or a background task fails, which is a bug and raised."""
        wait = asyncio.create_task(shutdown.wait())
        done, _ = await asyncio.wait([wait, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        wait.cancel()
        for task in done:
            task.result()

    async def drain(self) -> None:
        """Refuse new requests, let open streams finish within the grace, then stop."""
        self._is_draining = True
        self._health.set_serving(False)
        event(log, "draining", streams=self._fanout.num_open)
        num_left = await self._api.drain(self._settings.drain_grace_s)
        if num_left:
            log.warning("%d streams did not finish within the grace", num_left)
            message = "the server is shutting down; retry"
            self._fanout.fail_all(RequestError(Reason.DRAINING, message))
            await self._api.drain(_STOP_GRACE_S)
        self._health.close()
        await self._server.stop(_STOP_GRACE_S)
        await self.close()

    async def close(self) -> None:
        """Stop at once. Idempotent."""
        await self._server.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tokenizer.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def _set_ready(self, is_ready: bool) -> None:
        self._health.set_serving(is_ready and not self._is_draining)


def _bind(server: grpc.aio.Server, address: str) -> int:
    claim(address)
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: is the port in use?") from error


async def serve(settings: FrontendSettings, model: ModelDir) -> None:
    """Run a front end until SIGTERM or SIGINT, then drain. A second signal exits at once."""
    frontend = Frontend(settings, model)
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if shutdown.is_set():
            log.warning("second signal, exiting at once")
            os._exit(128 + number)
        event(log, "signal", name=number.name)
        shutdown.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await frontend.start()
        event(log, "listening", address=settings.listen, port=frontend.port, model=model.name)
        await frontend.run(shutdown)
        await frontend.drain()
    finally:
        await frontend.close()

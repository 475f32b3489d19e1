"""A front end's life: start, readiness, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import Tracer

from blockyard.common.admin import admin_server
from blockyard.common.grpc_options import keepalive, public_server_options
from blockyard.common.listen_address import bind
from blockyard.common.logs import event
from blockyard.common.model_dir import ModelDir
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.common.shutdown import on_first_signal
from blockyard.common.tls import ServerTls, server_credentials
from blockyard.common.version import software_version
from blockyard.engine.v1 import engine_pb2
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.access import ClientAccess
from scheduler_svc.frontend.api import SERVICE_NAME, GenerateApi
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.limits import RequestLimits
from scheduler_svc.frontend.metrics import FrontendMetrics, report_metrics
from scheduler_svc.frontend.tokenizer import PromptTokenizer
from scheduler_svc.frontend.tracing import SERVICE, RpcTracing
from scheduler_svc.health import HealthServicer
from scheduler_svc.telemetry import export
from scheduler_svc.telemetry.export import TraceExport
from scheduler_svc.telemetry.gen_ai import GenAiMetrics
from scheduler_svc.telemetry.loop_lag import LoopLag
from scheduler_svc.telemetry.metric_export import MetricExport

_HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_HARD_LIMIT: Final = 4
"""Messages up to so many times their limit are read, so that the answer can say what is wrong."""

_STOP_GRACE_S: Final = 1.0
"""For the last statuses to leave."""

_LOOK_EVERY_S: Final = 1.0
"""For clients that do not read."""

log = logging.getLogger(__name__)


class Frontend:
    """The parts of one front end, wired. Build it inside the event loop that serves it."""

    def __init__(self, settings: FrontendSettings, model: ModelDir) -> None:
        """Bind and wire; nothing is served before `start`.

        Raises ListenError, ModelDirError, or FileError for certificates and tokens.

        A port that is shared is bound later, see `start`.
        """
        self._settings = settings
        self._is_draining = False
        self._tokenizer = PromptTokenizer(model)
        self._lag = LoopLag()
        self._fanout = Fanout(self._lag, settings.max_merge_ms / 1e3)
        self._health = HealthServicer([SERVICE_NAME])
        hello = engine_pb2.Hello(
            protocol_version=ENGINE_PROTOCOL_VERSION,
            frontend_id=f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
            model_digest=model.digest,
        )
        self._link = EngineLink(
            settings.engine,
            hello,
            self._fanout,
            self._set_health,
            security=settings.link_security(),
            engine_name=settings.engine_name,
        )
        self._exports: list[TraceExport | MetricExport] = []
        tracer, gen_ai = self._begin_export(settings.otlp_endpoint, model.name)
        self._metrics = FrontendMetrics(self._fanout, self._lag, gen_ai)
        self._api = GenerateApi(
            model,
            self._tokenizer,
            self._link,
            self._fanout,
            self._metrics,
            version=software_version(),
            limits=RequestLimits(
                settings.max_request_bytes,
                settings.max_prompt_tokens,
                settings.max_buffered_tokens,
            ),
            tracer=tracer,
        )
        self._server = _public_server(settings, tracer)
        self._server.add_generic_rpc_handlers((self._api.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, _HEALTH_NAME, reflection.SERVICE_NAME), self._server
        )
        self._model_name = model.name
        self._credentials = _public_credentials(settings)
        self.port = 0 if settings.reuse_port else self._bind()
        """0: not listening yet."""
        self._has_met_engine = asyncio.Event()
        self._admin = admin_server(self._health, settings.admin)
        self._tasks: list[asyncio.Task[None]] = []

    def _begin_export(
        self, endpoint: str, model_name: str
    ) -> tuple[Tracer, GenAiMetrics] | tuple[None, None]:
        """What traces and measures for the collector; None where the settings name none."""
        traces = export.begin(endpoint)
        if traces is None:
            return None, None
        gen_ai = GenAiMetrics(model_name)
        self._exports = [traces, MetricExport.to_collector(endpoint, SERVICE, gen_ai.read)]
        return traces.tracer(SERVICE, sample_ratio=1), gen_ai

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self._link.state is not None and not self._is_draining

    async def start(self) -> None:
        """Serve; requests are refused with UNAVAILABLE until the engine is ready.

        One that shares its port begins to listen only then: others take the connections meanwhile.
        """
        if not self._settings.reuse_port:
            await self._listen()
        await self._admin.start()
        reporting = report_metrics(self._metrics, self._link)
        runs = (self._link.run(), self._lag.run(), self._end_slow_readers(), reporting)
        self._tasks = [asyncio.create_task(run) for run in runs]
        if self._settings.reuse_port:
            self._tasks.append(asyncio.create_task(self._join()))

    async def _join(self) -> None:
        await self._has_met_engine.wait()
        self.port = self._bind()
        await self._listen()
        await self._server.wait_for_termination()

    def _bind(self) -> int:
        return bind(self._server, self._settings.listen, self._credentials, is_private=False)

    async def _listen(self) -> None:
        await self._server.start()
        settings = self._settings
        event(
            log,
            "listening",
            address=settings.listen,
            port=self.port,
            model=self._model_name,
            tls=self._credentials is not None,
            client_certificates=settings.tls_client_ca is not None,
            tokens=settings.auth_tokens is not None,
        )

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
        """Say NOT_SERVING, serve on until that is known, let open streams finish, then stop."""
        settings = self._settings
        self._is_draining = True
        self._set_health(self._link.state)
        event(log, "lame duck", seconds=settings.lame_duck_s, streams=self._fanout.num_open)
        await asyncio.sleep(settings.lame_duck_s)
        event(log, "draining", streams=self._fanout.num_open)
        self._health.close()
        # Closes the port at once, and tells clients to go elsewhere with what is new.
        stopping = asyncio.create_task(self._server.stop(settings.drain_grace_s + _STOP_GRACE_S))
        await asyncio.wait([stopping], timeout=settings.drain_grace_s)
        if not stopping.done():
            log.warning("%d streams did not finish within the grace", self._fanout.num_open)
            message = "the server is shutting down; retry"
            self._fanout.fail_all(RequestError(Reason.DRAINING, message))
        await stopping
        if self._link.wants_metrics:
            self._link.report(self._metrics.take_report())
        await self._link.leave(_STOP_GRACE_S)
        await self.close()

    async def close(self) -> None:
        """Stop at once. Idempotent."""
        await self._server.stop(0)
        await self._admin.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tokenizer.close()
        await asyncio.gather(*(asyncio.to_thread(each.close) for each in self._exports))

    def _set_health(self, state: engine_pb2.EngineState | None) -> None:
        """Tell those who ask what the engine's state (None: not ready) means to them."""
        if state is not None:
            self._has_met_engine.set()
        self._health.update(
            is_ready=state is not None and not self._is_draining,
            is_progressing=state is not None and not state.stalled,
        )


def _public_server(settings: FrontendSettings, tracer: Tracer | None) -> grpc.aio.Server:
    """The public port's server: knows its clients, traces their calls; no service is on it yet."""
    access = ClientAccess(settings.auth_tokens, settings.max_client_streams)
    interceptors: list[grpc.aio.ServerInterceptor] = [access]
    if tracer is not None:
        interceptors.insert(0, RpcTracing(tracer, SERVICE_NAME, settings.trace_sample_ratio))
    return grpc.aio.server(
        interceptors=interceptors,
        options=public_server_options(
            _HARD_LIMIT * settings.max_request_bytes,
            reuse_port=settings.reuse_port,
            keepalive=keepalive(settings.keepalive_s, settings.keepalive_timeout_s),
            max_connection_age_s=settings.max_connection_age_s,
        ),
    )


def _public_credentials(settings: FrontendSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_credentials(
        ServerTls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    )


async def serve(settings: FrontendSettings, model: ModelDir) -> None:
    """Run a front end until SIGTERM or SIGINT, then drain. A second signal exits at once."""
    frontend = Frontend(settings, model)
    shutdown = on_first_signal()
    try:
        await frontend.start()
        await frontend.run(shutdown)
        await frontend.drain()
    finally:
        await frontend.close()

"""The one stream to the engine: connects, reconnects, batches what goes out.

Knows frames and readiness; what output means is the fan-out's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from blockyard.common.grpc_options import short_reason
from blockyard.common.link_security import PLAIN, LinkSecurity
from blockyard.common.logs import event
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc as pb_grpc
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend.fanout import Fanout, Stop

_RETRY_INTERVAL_S: Final = 0.2
_INCOMPATIBLE_RETRY_INTERVAL_S: Final = 1.0
_RETRY_DELAY_S: Final = 1.0
"""What clients are told: an engine that ended is back after about so long."""
_MAX_FRAME_BYTES: Final = 1 << 20
"""Of prompts in one frame: the engine takes a frame in one go, and steps must not wait for it."""

log = logging.getLogger(__name__)

_Call = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


@dataclass(frozen=True, slots=True)
class _Loss:
    """Why a connection ended, and how long to wait before the next."""

    problem: str
    pause_s: float = _RETRY_INTERVAL_S


class EngineLink:
    """A long-lived stream; `run` keeps it up."""

    def __init__(
        self,
        target: str,
        hello: pb.Hello,
        fanout: Fanout,
        on_state: Callable[[pb.EngineState | None], None],
        *,
        security: LinkSecurity = PLAIN,
        engine_name: str = "",
    ) -> None:
        """Nothing is connected before `run`.

        Args:
            target: gRPC address, e.g. unix:/run/engine.sock.
            hello: the first frame; its model digest must be the engine's.
            fanout: takes output; its streams fail when the engine is lost.
            on_state: called with `state` whenever that changes.
            security: how to connect.
            engine_name: what the engine's certificate must be for, if not the target's host.
        """
        self._target = target
        self._security = security
        self._engine_name = engine_name
        self._hello = hello
        self._fanout = fanout
        self._on_state = on_state
        self._state: pb.EngineState | None = None
        self._submits: list[pb.Submit] = []
        self._stops: list[Stop] = []
        self._metrics: pb.FrontendMetrics | None = None
        self._has_outgoing = asyncio.Event()
        self._last_problem = ""
        self._is_leaving = False
        self._has_left = asyncio.Event()

    @property
    def state(self) -> pb.EngineState | None:
        """The engine's state while it is ready and serves our model, else None."""
        return self._state

    def submit(self, submit: pb.Submit) -> None:
        """Send a request with this tick's batch. The link must be ready."""
        assert self._state is not None
        self._submits.append(submit)
        self._has_outgoing.set()

    def stop(self, stops: list[Stop]) -> None:
        """End requests early; forgotten if the link is down, as the engine aborted them then."""
        if stops and self._state is not None:
            self._stops.extend(stops)
            self._has_outgoing.set()

    @property
    def wants_metrics(self) -> bool:
        """Whether the engine would take a report now."""
        return self._state is not None and self._state.wants_metrics and self._metrics is None

    def report(self, metrics: pb.FrontendMetrics) -> None:
        """Send what was counted with this tick's batch."""
        self._metrics = metrics
        self._has_outgoing.set()

    async def run(self) -> None:
        """Connect, serve, reconnect, until `leave`, or cancelled."""
        while not self._is_leaving:
            # A new channel each time: certificates may have changed.
            async with self._security.channel(self._target, self._engine_name) as channel:
                stub: pb_grpc.EngineServiceAsyncStub = pb_grpc.EngineServiceStub(channel)
                loss = await self._serve(stub.Connect())
            self._lose(loss.problem)
            await asyncio.sleep(0 if self._is_leaving else loss.pause_s)
        self._has_left.set()

    async def leave(self, limit_s: float) -> None:
        """End the stream in order: what was submitted or reported arrives. Waits no longer than so.

        `run` must be running.
        """
        self._is_leaving = True
        self._has_outgoing.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_left.wait(), limit_s)

    async def _serve(self, call: _Call) -> _Loss:
        """One connection, until it breaks."""
        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send(call))
                loss = await self._receive(call)
                sender.cancel()
        finally:
            call.cancel()
        return loss

    async def _send(self, call: _Call) -> None:
        try:
            await call.write(pb.ConnectRequest(hello=self._hello))
            while True:
                await self._has_outgoing.wait()
                self._has_outgoing.clear()
                for frame in self._take_frames():
                    await call.write(frame)
                if self._is_leaving and not self._has_outgoing.is_set():
                    await call.done_writing()
                    return
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream broke: the receiving side learns the status.
            return

    def _take_frames(self) -> list[pb.ConnectRequest]:
        """What has gathered since the last write. A stop comes after its own submit."""
        submits, self._submits = self._submits, []
        stops, self._stops = self._stops, []
        frames = [
            pb.ConnectRequest(submit=pb.SubmitBatch(submits=batch)) for batch in _batches(submits)
        ]
        if stops:
            keys, num_kept, branches = zip(*stops, strict=True)
            stop = pb.StopBatch(request_ids=keys, num_output_tokens=num_kept, branches=branches)
            frames.append(pb.ConnectRequest(stop=stop))
        if self._metrics is not None:
            frames.append(pb.ConnectRequest(metrics=self._metrics))
            self._metrics = None
        return frames

    async def _receive(self, call: _Call) -> _Loss:
        try:
            async for frame in call:
                if frame.HasField("output"):
                    self.stop(self._fanout.apply(frame.output))
                elif (problem := self._take_state(frame.state)) is not None:
                    return _Loss(problem, _INCOMPATIBLE_RETRY_INTERVAL_S)
                # Batches that are already here must not starve the streams' handlers.
                await asyncio.sleep(0)
        except grpc.aio.AioRpcError as error:
            problem = short_reason(error, self._target)
            is_refused = error.code() == grpc.StatusCode.FAILED_PRECONDITION
            return _Loss(
                problem, _INCOMPATIBLE_RETRY_INTERVAL_S if is_refused else _RETRY_INTERVAL_S
            )
        return _Loss("the engine closed the stream")

    def _take_state(self, state: pb.EngineState) -> str | None:
        """Take a state frame; returns why this engine cannot be used, if so."""
        if state.ready and state.model_digest != self._hello.model_digest:
            return (
                f"the engine serves model {state.model_name} with digest {state.model_digest}; "
                f"this front end has digest {self._hello.model_digest}"
            )
        if (self._state is not None) != state.ready:
            self._last_problem = ""
            event(
                log, "engine ready" if state.ready else "engine not ready", model=state.model_name
            )
        self._set_state(state if state.ready else None)
        return None

    def _set_state(self, state: pb.EngineState | None) -> None:
        if state != self._state:
            self._state = state
            self._on_state(state)

    def _lose(self, problem: str) -> None:
        """The stream is gone, and with it every request on it."""
        if problem != self._last_problem and not self._is_leaving:
            self._last_problem = problem
            log.warning("engine link: %s", problem)
        self._set_state(None)
        self._submits.clear()
        self._stops.clear()
        self._metrics = None
        self._has_outgoing.clear()
        self._fanout.fail_all(
            RequestError(
                Reason.ENGINE_LOST, "the engine was lost; retry", retry_delay_s=_RETRY_DELAY_S
            )
        )


def _batches(submits: list[pb.Submit]) -> Iterator[list[pb.Submit]]:
    """Cut into runs of at most _MAX_FRAME_BYTES of prompts, or of one submit."""
    batch: list[pb.Submit] = []
    num_bytes = 0
    for submit in submits:
        num_bytes += len(submit.prompt_token_ids)
        if batch and num_bytes > _MAX_FRAME_BYTES:
            yield batch
            batch, num_bytes = [], len(submit.prompt_token_ids)
        batch.append(submit)
    if batch:
        yield batch

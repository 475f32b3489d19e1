"""An executor that does what a test tells it, frame by frame, behind a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from scheduler_svc.executor_client import IncompatibleExecutorError, LinkState

_Context = grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]


@dataclass(slots=True)
class Session:
    """One Run call: what came in, and what is to go out. None ends it."""

    opening: pb.Open
    plans: asyncio.Queue[pb.StepPlan] = field(default_factory=asyncio.Queue)
    num_heartbeats: int = 0
    outbox: asyncio.Queue[pb.RunResponse | None] = field(default_factory=asyncio.Queue)

    def send(self, **frame: object) -> None:
        """Send a frame: `opened=...`, `result=...` and so on."""
        self.outbox.put_nowait(pb.RunResponse(**frame))  # type: ignore[arg-type]  # one of its fields

    def opened(self, epoch: int, applied_step_id: int = 0) -> None:
        """Answer Open."""
        self.send(opened=pb.Opened(epoch=epoch, applied_step_id=applied_step_id))

    def result(self, epoch: int, step_id: int) -> None:
        """Answer a plan."""
        self.send(result=pb.StepResult(epoch=epoch, step_id=step_id))

    def end(self) -> None:
        """End the stream with OK."""
        self.outbox.put_nowait(None)


class ScriptedExecutor(pb_grpc.ExecutorServiceServicer):
    """Answers Describe; hands every opened stream to the test as a Session."""

    def __init__(self, **description: object) -> None:
        """`description` is DescribeResponse's fields; the protocol version fits unless given."""
        fields = {"protocol_version": EXECUTOR_PROTOCOL_VERSION, "model_digest": "d1"}
        self.description = pb.DescribeResponse(**{**fields, **description})  # type: ignore[arg-type]  # its fields
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.sessions: asyncio.Queue[Session] = asyncio.Queue()

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.DescribeResponse:
        """The description as it is now."""
        return self.description

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: _Context
    ) -> AsyncIterator[pb.RunResponse]:
        """Refuse, or give the test a session."""
        first = await anext(request_iterator)
        if self.refusal is not None:
            await context.abort(*self.refusal)
        session = Session(first.open)
        self.sessions.put_nowait(session)
        reader = asyncio.create_task(_read(request_iterator, session))
        try:
            while (frame := await session.outbox.get()) is not None:
                yield frame
        finally:
            reader.cancel()


async def _read(requests: AsyncIterator[pb.RunRequest], session: Session) -> None:
    async for request in requests:
        if request.HasField("plan"):
            session.plans.put_nowait(request.plan)
        else:
            session.num_heartbeats += 1


async def serve(executor: ScriptedExecutor, address: str) -> grpc.aio.Server:
    """Start serving."""
    server = grpc.aio.server(options=LINK_OPTIONS)
    pb_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    server.add_insecure_port(address)
    await server.start()
    return server


class RecordingHandler:
    """The client's handler: writes everything down and refuses digests it does not know."""

    def __init__(self, digest: str = "d1") -> None:
        self.epochs: list[int] = []
        self.results: list[int] = []
        self.states: list[tuple[LinkState, str]] = []
        self.cost_models: list[pb.CostModel] = []
        self._digest = digest
        self._changed = asyncio.Event()

    def on_describe(self, info: pb.DescribeResponse) -> None:
        if info.model_digest != self._digest:
            raise IncompatibleExecutorError(f"digest {info.model_digest}")

    def on_new_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def on_result(self, result: pb.StepResult) -> None:
        self.results.append(result.step_id)
        self._changed.set()

    def on_cost_model(self, cost_model: pb.CostModel) -> None:
        self.cost_models.append(cost_model)
        self._changed.set()

    def on_state(self, state: LinkState, message: str) -> None:
        self.states.append((state, message))
        self._changed.set()

    async def state(self, wanted: LinkState) -> str:
        """Wait until the link is in a state; returns the reason given."""
        await self._until(lambda: bool(self.states) and self.states[-1][0] is wanted)
        return self.states[-1][1]

    async def result(self, step_id: int) -> None:
        """Wait until a result was taken."""
        await self._until(lambda: step_id in self.results)

    async def cost_model(self) -> pb.CostModel:
        """Wait until prices came; returns the newest."""
        await self._until(lambda: bool(self.cost_models))
        return self.cost_models[-1]

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

"""A step stream to an executor, driven frame by frame."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Final, Self

import grpc.aio

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc

_TIMEOUT_S: Final = 5.0
_Call = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]


class StepStream:
    """One Run stream over a channel of its own; use as a context manager."""

    def __init__(self, address: str) -> None:
        """Connect; nothing is sent."""
        self.epoch = 0
        self.heartbeats: list[pb.Heartbeat] = []
        self._channel = grpc.aio.insecure_channel(
            address, [*LINK_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub: pb_grpc.ExecutorServiceAsyncStub = pb_grpc.ExecutorServiceStub(self._channel)
        self._call: _Call | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def open(self, scheduler_id: int = 1, **fields: Any) -> pb.Opened:
        """Send Open and return its answer; `fields` are Open's."""
        fields = {"protocol_version": EXECUTOR_PROTOCOL_VERSION, **fields}
        await self.write(pb.RunRequest(open=pb.Open(scheduler_id=scheduler_id, **fields)))
        frame = await self.next()
        assert frame.HasField("opened"), frame
        self.epoch = frame.opened.epoch
        return frame.opened

    async def write(self, frame: pb.RunRequest) -> None:
        """Send any frame; the first one starts the call."""
        if self._call is None:
            self._call = self.stub.Run()
        await self._call.write(frame)

    async def send(self, step_id: int, plan: pb.StepPlan) -> None:
        """Send `plan` as this step of the stream's epoch."""
        plan.epoch, plan.step_id = self.epoch, step_id
        await self.write(pb.RunRequest(plan=plan))

    async def next(self) -> pb.RunResponse:
        """The next frame that is no heartbeat. Raises AioRpcError when the stream fails."""
        assert self._call is not None
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                frame = await self._call.read()
                if not isinstance(frame, pb.RunResponse):
                    raise EOFError
                if not frame.HasField("heartbeat"):
                    return frame
                self.heartbeats.append(frame.heartbeat)

    async def tokens(self, step_id: int) -> list[int]:
        """Token ids of the next frame, which must be this step's result."""
        frame = await self.next()
        assert frame.HasField("result"), frame
        assert (frame.result.epoch, frame.result.step_id) == (self.epoch, step_id)
        return list(frame.result.token_ids)

    async def run(self, step_id: int, plan: pb.StepPlan) -> list[int]:
        """One step, sent and answered."""
        await self.send(step_id, plan)
        return await self.tokens(step_id)

    async def rejected(self, step_id: int, plan: pb.StepPlan) -> pb.PlanRejected:
        """Send a plan that must be refused."""
        await self.send(step_id, plan)
        frame = await self.next()
        assert frame.HasField("rejected"), frame
        assert frame.rejected.step_id == plan.step_id
        return frame.rejected

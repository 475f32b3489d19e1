"""The scheduler's end of a step stream, by hand, for the tests of the service."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.executor.v1 import executor_pb2_grpc as pb_grpc
from executor_svc.backends.checking.runner import fake_info
from executor_svc.service import ExecutorServicer
from executor_svc.tests.plans import decode_same, prefill

INFO = fake_info(64, 4, block_size=4, max_rows=8, max_model_len=64)
PROMPT = [3, 1, 4, 1, 5]
BLOCKS = [1, 2, 3, 4, 5]
Call = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]


class Client:
    """One step stream, by hand."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.epoch = 0
        self.heartbeats: list[pb.Heartbeat] = []

    async def open(self, scheduler_id: int = 1, **fields: Any) -> pb.Opened:
        fields = {"protocol_version": EXECUTOR_PROTOCOL_VERSION, **fields}
        await self.call.write(pb.RunRequest(open=pb.Open(scheduler_id=scheduler_id, **fields)))
        frame = await self.next()
        assert frame.HasField("opened"), frame
        self.epoch = frame.opened.epoch
        return frame.opened

    async def next(self) -> pb.RunResponse:
        """The next frame that is no heartbeat."""
        while True:
            frame = await asyncio.wait_for(self.call.read(), 5)
            if not isinstance(frame, pb.RunResponse):
                raise EOFError
            if not frame.HasField("heartbeat"):
                return frame
            self.heartbeats.append(frame.heartbeat)

    async def send(self, plan: pb.StepPlan) -> None:
        await self.call.write(pb.RunRequest(plan=plan))

    async def begin(self) -> None:
        """Plan 1: the prompt, with blocks for all that follows."""
        await self.send(prefill(1, self.epoch, 0, PROMPT, BLOCKS))

    async def decode(self, step_id: int) -> None:
        await self.send(decode_same(step_id, self.epoch))

    async def token(self, step_id: int) -> int:
        frame = await self.next()
        assert frame.HasField("result"), frame
        assert (frame.result.epoch, frame.result.step_id) == (self.epoch, step_id)
        return frame.result.token_ids[0]

    async def ends_with(self, code: grpc.StatusCode) -> str:
        """Details of the status, after whatever frames are left."""
        with contextlib.suppress(EOFError, grpc.aio.AioRpcError):
            while True:
                await self.next()
        assert await self.call.code() is code
        return str(await self.call.details())


class Server:
    """A servicer on a unix socket."""

    def __init__(self, servicer: ExecutorServicer, fatal: asyncio.Future[str], target: str) -> None:
        self.servicer, self.fatal = servicer, fatal
        self._target = target
        self._channels: list[grpc.aio.Channel] = []

    def stub(self) -> pb_grpc.ExecutorServiceAsyncStub:
        channel = grpc.aio.insecure_channel(
            self._target, [*LINK_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        )
        self._channels.append(channel)
        return pb_grpc.ExecutorServiceStub(channel)

    def client(self) -> Client:
        return Client(self.stub().Run())

    async def close_clients(self) -> None:
        for channel in self._channels:
            await channel.close()

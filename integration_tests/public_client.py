"""The public API as a test uses it: whole streams, kept message by message."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc as pb_grpc


@dataclass(slots=True)
class Answer:
    """What one stream brought."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED
    usage: pb.Usage | None = None
    num_messages: int = 0
    code: grpc.StatusCode | None = None
    details: str = ""

    def add(self, message: pb.GenerateResponse) -> None:
        """Take the next message."""
        self.num_messages += 1
        self.token_ids.extend(message.token_ids)
        self.text += message.text
        if message.finish_reason:
            assert not self.finish_reason, "finished twice"
            self.finish_reason = message.finish_reason
        if message.HasField("usage"):
            self.usage = message.usage


class PublicClient:
    """Streams over one channel; use as a context manager."""

    def __init__(self, address: str) -> None:
        """Connect when first needed."""
        self._channel = grpc.aio.insecure_channel(
            address,
            [
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        self.stub: pb_grpc.GenerateServiceAsyncStub = pb_grpc.GenerateServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # its stubs name no methods

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def serving(self) -> None:
        """Wait until the front end takes requests."""
        request = health_pb2.HealthCheckRequest()
        while True:
            try:
                answer = await self._health.Check(request, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # it is just being replaced
            await asyncio.sleep(0.02)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """One stream to its end, which may be an error; `fields` are SamplingParams'."""
        answer = Answer()
        await self.follow(self.start(prompt_ids, max_tokens, timeout_s, **fields), answer)
        return answer

    def start(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        """Begin a stream."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt_ids),
            sampling=pb.SamplingParams(**{"temperature": 0.0, **fields}),
            stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        return self.stub.Generate(request, timeout=timeout_s)

    async def follow(
        self,
        call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse],
        answer: Answer,
    ) -> None:
        """Read a stream to its end into `answer`."""
        try:
            async for message in call:
                answer.add(message)
            answer.code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            answer.code, answer.details = error.code(), str(error.details())

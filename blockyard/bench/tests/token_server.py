"""A GenerateService that sends as many tokens as are asked for, two a message, at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc as pb_grpc

MAX_MODEL_LEN = 2000


@dataclass
class TokenServer(pb_grpc.GenerateServiceServicer):
    """Prompts of `failing_length` tokens fail, those of `short_length` get one token too few."""

    address: str = ""
    failing_length: int = 0
    short_length: int = 0
    delay_s: float = 0.0  # before each message
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: dict[str, str | bytes] = field(default_factory=dict)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.update(context.invocation_metadata())
        num_prompt_tokens = len(request.token_ids.ids)
        if num_prompt_tokens == self.failing_length:
            context.abort(grpc.StatusCode.INTERNAL, "this one fails")
        num_left = request.stop.max_tokens - (num_prompt_tokens == self.short_length)
        while num_left > 0:
            time.sleep(self.delay_s)
            count = min(2, num_left)
            num_left -= count
            for choice in range(max(1, request.num_samples)):
                yield pb.GenerateResponse(choice_index=choice, token_ids=[7] * count)
        yield pb.GenerateResponse(usage=pb.Usage(cached_tokens=3, preemptions=1))

    def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        raise NotImplementedError("nothing here asks for it")

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            name="tokens", vocab_size=50, max_model_len=MAX_MODEL_LEN, device="a test"
        )


@contextlib.contextmanager
def token_server(
    *,
    failing_length: int = 0,
    short_length: int = 0,
    delay_s: float = 0.0,
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[TokenServer]:
    """Serve until the exit."""
    servicer = TokenServer("", failing_length, short_length, delay_s)
    server = grpc.server(futures.ThreadPoolExecutor(16))
    pb_grpc.add_GenerateServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    servicer.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(None).wait()

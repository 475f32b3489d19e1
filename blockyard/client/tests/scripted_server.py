"""A GenerateService with scripted answers, on a port of its own, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc as pb_grpc

USAGE = pb.Usage(
    prompt_tokens=4,
    output_tokens=3,
    cached_tokens=2,
    seed=77,
    preemptions=1,
    block_seconds=0.5,
    blocks_shared=5,
    blocks_copied=6,
    blocks_swapped_out=7,
    blocks_swapped_in=8,
)
LOGPROBS = [
    pb.TokenLogprob(logprob=-0.5, candidate_token_ids=[20], candidate_logprobs=[-0.25]),
    pb.TokenLogprob(logprob=-1),
]
"""Of the last message's tokens, and of each choice's."""


@dataclass
class ScriptedServer(pb_grpc.GenerateServiceServicer):
    """Answers by the prompt: "fail", "slow", "endless", or anything else."""

    address: str = ""
    has_chat_template: bool = True
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    trace_headers: list[str] = field(default_factory=list)  # of each request; empty: none
    tokens: list[str] = field(default_factory=list)  # of each call; empty: none
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self._begin(request, context)
        context.add_callback(self.cancelled.set)
        yield pb.GenerateResponse(request_id="r1", text="one ", token_ids=[10])
        while request.prompt == "endless" and context.is_active():
            yield pb.GenerateResponse(request_id="r1", text="more ", token_ids=[11])
            self.cancelled.wait(0.01)
        yield pb.GenerateResponse(
            request_id="r1",
            choice_index=max(1, request.num_samples) - 1,
            text="two",
            token_ids=[11, 12],
            finish_reason=pb.FINISH_REASON_STOP,
            stop_reason=pb.StopReason(string="."),
            usage=USAGE,
            logprobs=LOGPROBS if request.HasField("logprobs") else (),
            score=-0.5 * request.beam.width,
        )

    def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        self._begin(request, context)
        text = request.prompt or " ".join(message.content for message in request.chat.messages)
        num_choices = max(1, request.num_samples, request.beam.num_choices)
        choices = [
            pb.Choice(
                index=index,
                text=text.upper() + "'" * index,
                token_ids=[10, 11],
                finish_reason=pb.FINISH_REASON_LENGTH,
                logprobs=LOGPROBS if request.HasField("logprobs") else (),
                score=-0.5 * index if request.HasField("beam") else 0,
            )
            for index in range(num_choices)
        ]
        return pb.GenerateUnaryResponse(request_id="r1", choices=choices, usage=USAGE)

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        self._note_token(context)
        return pb.GetModelResponse(
            name="scripted",
            digest="d",
            vocab_size=100,
            max_model_len=64,
            has_chat_template=self.has_chat_template,
            eos_token_ids=[2, 3],
            version="0",
            max_branches=16,
            device="scripted device",
        )

    def _note_token(self, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.tokens.append(str(metadata.get("authorization", "")))

    def _begin(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self._note_token(context)
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.trace_headers.append(metadata.get("traceparent", ""))
        if request.prompt == "fail":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: out of range")
        if request.prompt == "slow":
            self.cancelled.wait(5)


@contextlib.contextmanager
def scripted_server(
    *, has_chat_template: bool = True, credentials: grpc.ServerCredentials | None = None
) -> Iterator[ScriptedServer]:
    """Serve until the exit."""
    servicer = ScriptedServer(has_chat_template=has_chat_template)
    server = grpc.server(futures.ThreadPoolExecutor(8))
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
        servicer.cancelled.set()
        server.stop(None).wait()

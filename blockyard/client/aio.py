"""The asynchronous client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.aio

from blockyard.client import response as wire
from blockyard.client.base import Access, ClientBase, channel_options
from blockyard.client.errors import rpc_errors
from blockyard.client.request import GenerateOptions, Message, build_request
from blockyard.client.response import Chunk, Completion, ModelInfo
from blockyard.common.tls import Tls
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc as pb_grpc


class AsyncClient(ClientBase):
    """Talks to one server from the event loop it is made in; connects on the first call.

        async with AsyncClient("127.0.0.1:50051") as client:
            async for chunk in client.generate("Once upon a time", max_tokens=50):
                print(chunk.text, end="", flush=True)

    Every call raises BlockyardError.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        timeout: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        allow_insecure_token: bool = False,
    ) -> None:
        """Nothing is connected yet.

        Args:
            address: host:port, or unix:/path.
            timeout: holds for each call that gives none [s]; None: no limit.
            tls: None: a connection in the clear.
            token: the bearer token, for servers that ask for one.
            allow_insecure_token: send it in the clear to another machine: something on the way,
                a sidecar perhaps, encrypts.
        """
        access = Access(tls=tls, token=token, allow_insecure_token=allow_insecure_token)
        super().__init__(address, timeout, access)
        options, credentials = channel_options(address, tls), access.credentials()
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._stub: pb_grpc.GenerateServiceAsyncStub = pb_grpc.GenerateServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the output; chunks of several choices come mixed.

        Closing the iterator (`aclose`), or its task, cancels the request.

        Args:
            prompt: plain text; give this, or `token_ids`, or `messages` (a chat).
            token_ids: an already tokenised prompt.
            messages: rendered through the model's chat template.
            timeout: for the whole stream [s].
            options: see GenerateOptions.
        """
        request = build_request(prompt, token_ids, messages, options)
        return self._stream(request, timeout)

    async def complete(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """All choices at once; arguments as for `generate`."""
        request = build_request(prompt, token_ids, messages, options)
        with self._calling("GenerateUnary") as metadata, rpc_errors():
            response = await self._stub.GenerateUnary(
                request, timeout=self._limit(timeout), metadata=metadata
            )
        return wire.completion(response)

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """The model served, and its limits."""
        with self._calling("GetModel") as metadata, rpc_errors():
            response = await self._stub.GetModel(
                pb.GetModelRequest(), timeout=self._limit(timeout), metadata=metadata
            )
        return wire.model_info(response)

    async def _stream(
        self, request: pb.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Chunk, None]:
        with self._calling("Generate") as metadata:
            call = self._stub.Generate(request, timeout=self._limit(timeout), metadata=metadata)
            try:
                with rpc_errors():
                    async for response in call:
                        yield wire.chunk(response)
            finally:
                call.cancel()  # does nothing to a stream that has ended

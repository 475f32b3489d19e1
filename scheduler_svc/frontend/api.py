"""blockyard.v1.GenerateService: admission, streaming, ends.

Requests are parsed and responses serialised here, on bytes: a malformed request then gets a clear
status, and a response is serialised once. Nothing is sent before admission, the engine's included,
so errors until then are Trailers-Only and clients may retry them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from blockyard.common.columns import pack_u32
from blockyard.common.model_dir import ModelDir
from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend import validation
from scheduler_svc.frontend.chat_template import ChatTemplateError
from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.output_stream import Chunk, Ending, EngineUsage, OutputStream
from scheduler_svc.frontend.request_log import RequestRecord
from scheduler_svc.frontend.stop_strings import StopStrings
from scheduler_svc.frontend.tokenizer import PromptTokenizer
from scheduler_svc.frontend.validation import RequestError, Sampling, Stopping

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerateService"].full_name

_USAGE_TIMEOUT_S: Final = 1.0
"""How long a finished client waits for the engine's numbers after a stop string."""

_NO_DEADLINE_S: Final = 1e9
"""gRPC reports an absent deadline as one centuries away."""

log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[bytes, bytes]
_Result = TypeVar("_Result")
_Message = TypeVar("_Message", bound=Message)


class GenerateApi:
    """The public methods."""

    def __init__(
        self,
        model: ModelDir,
        tokenizer: PromptTokenizer,
        link: EngineLink,
        fanout: Fanout,
        *,
        version: str,
        max_buffered_tokens: int,
    ) -> None:
        self._is_draining = False
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._model = model
        self._tokenizer = tokenizer
        self._link = link
        self._fanout = fanout
        self._version = version
        self._max_buffered_tokens = max_buffered_tokens

    async def drain(self, grace_s: float) -> int:
        """Refuse new requests; wait for the open ones. Returns how many are left."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        return self._num_active

    def handler(self) -> grpc.GenericRpcHandler:
        """What to register with the server. Requests and responses are bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
                "GenerateUnary": grpc.unary_unary_rpc_method_handler(self.generate_unary),
                "GetModel": grpc.unary_unary_rpc_method_handler(self.get_model),
            },
        )

    async def generate(self, data: bytes, context: _Context) -> None:
        """Generate: sends chunks as the fan-out releases them."""

        async def respond(stream: OutputStream, record: RequestRecord) -> None:
            while True:
                chunk = await _next_chunk(stream)
                _note_ending(record, chunk.ending)
                await context.write(_response(stream, record, chunk))
                if chunk.usage is not None:
                    return

        await self._serve(data, context, self._max_buffered_tokens, respond)

    async def generate_unary(self, data: bytes, context: _Context) -> bytes:
        """GenerateUnary: one answer at the end."""

        async def respond(stream: OutputStream, record: RequestRecord) -> bytes:
            response = pb.GenerateUnaryResponse(request_id=record.request_id)
            choice = response.choices.add()
            while not response.HasField("usage"):
                chunk = await _next_chunk(stream)
                _note_ending(record, chunk.ending)
                choice.text += chunk.text
                choice.token_ids.extend(chunk.token_ids)
                _set_ending(choice, chunk.ending)
                _set_usage(response, stream, record, chunk.usage)
            return response.SerializeToString()

        return await self._serve(data, context, None, respond)

    async def get_model(self, data: bytes, context: _Context) -> bytes:
        """GetModel: UNAVAILABLE until the engine is known."""
        try:
            _parse(pb.GetModelRequest, data)
            state = self._engine_state()
        except RequestError as error:
            await context.abort(error.code, str(error))
        return pb.GetModelResponse(
            name=self._model.name,
            digest=self._model.digest,
            vocab_size=self._model.vocab_size,
            max_model_len=state.max_model_len,
            has_chat_template=self._tokenizer.has_chat_template,
            eos_token_ids=self._model.eos_token_ids,
            version=self._version,
        ).SerializeToString()

    async def _serve(
        self,
        data: bytes,
        context: _Context,
        max_buffered_tokens: int | None,
        respond: Callable[[OutputStream, RequestRecord], Awaitable[_Result]],
    ) -> _Result:
        """The edge of a request: admits it, turns errors into statuses, always cleans up."""
        record = RequestRecord()
        stream: OutputStream | None = None
        self._num_active += 1
        self._idle.clear()
        try:
            if self._is_draining:
                raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server is draining; retry")
            stream = await self._admit(data, context, max_buffered_tokens, record)
            return await respond(stream, record)
        except RequestError as error:
            record.status = error.code.name
            await context.abort(error.code, str(error))
        except asyncio.CancelledError:
            has_expired = _deadline_unix_ns(context) > 0 and context.time_remaining() <= 0
            record.status = "DEADLINE_EXCEEDED" if has_expired else "CANCELLED"
            raise
        except Exception:
            # The service edge: whatever else goes wrong ends this request alone.
            log.exception("request %s failed", record.request_id)
            record.status = grpc.StatusCode.INTERNAL.name
            await context.abort(grpc.StatusCode.INTERNAL, "internal error of the front end")
        finally:
            if stream is not None:
                self._link.stop(self._fanout.close(stream))
            record.write(stream)
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()

    async def _admit(
        self,
        data: bytes,
        context: _Context,
        max_buffered_tokens: int | None,
        record: RequestRecord,
    ) -> OutputStream:
        """Check, tokenise and submit. Raises RequestError."""
        request = _parse(pb.GenerateRequest, data)
        record.request_id = validation.check_request_id(request)
        max_model_len = self._engine_state().max_model_len
        vocab_size = self._model.vocab_size
        validation.check_input(request, vocab_size)
        sampling = validation.check_sampling(request.sampling, self._model.sampling_defaults)
        record.seed = sampling.seed
        stopping = validation.check_stopping(request, self._model.eos_token_ids, vocab_size)
        prompt = await self._tokenise(request, max_model_len)
        record.num_prompt_tokens = len(prompt)
        # Tokenising took time: the engine may have come, gone or changed.
        state = self._engine_state()
        validation.check_length(len(prompt), stopping.max_tokens, state.max_model_len)
        stream = self._fanout.open(
            stopping.token_ids,
            None if request.skip_text else new_detokenizer(self._tokenizer.vocabulary),
            StopStrings(stopping.strings) if stopping.strings else None,
            max_buffered_tokens,
        )
        deadline_unix_ns = _deadline_unix_ns(context)
        self._link.submit(_submit(stream.key, prompt, sampling, stopping, deadline_unix_ns))
        return stream

    def _engine_state(self) -> engine_pb.EngineState:
        state = self._link.state
        if state is None:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the engine is not ready yet; retry")
        return state

    async def _tokenise(self, request: pb.GenerateRequest, max_model_len: int) -> list[int]:
        """Token ids of the input; text that cannot fit is refused before any work is done."""
        kind = request.WhichOneof("input")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        num_chars = len(request.prompt) + sum(len(m.content) for m in request.chat.messages)
        if num_chars > self._tokenizer.max_text_chars(max_model_len):
            raise validation.invalid(
                f"{kind}: {num_chars} characters are more than the {max_model_len} tokens that "
                "prompt and output may have together"
            )
        if kind == "prompt":
            return await self._tokenizer.encode_prompt(request.prompt)
        if not self._tokenizer.has_chat_template:
            raise validation.invalid(
                "chat: the model has no chat template; send prompt or token_ids"
            )
        messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
        try:
            return await self._tokenizer.encode_chat(messages)
        except ChatTemplateError as error:
            raise validation.invalid(f"chat: {error}") from error


def _parse(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        # Not valid protobuf, or a string field that is not UTF-8.
        name = kind.DESCRIPTOR.name
        raise validation.invalid(f"not a valid {name}: {error}") from error


def _deadline_unix_ns(context: _Context) -> int:
    """0: the client set none."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None or remaining_s > _NO_DEADLINE_S:
        return 0
    return time.time_ns() + int(remaining_s * 1e9)


def _submit(
    key: int, prompt: list[int], sampling: Sampling, stopping: Stopping, deadline_unix_ns: int
) -> engine_pb.Submit:
    return engine_pb.Submit(
        request_id=key,
        prompt_token_ids=pack_u32(prompt),
        max_tokens=stopping.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=stopping.token_ids,
        deadline_unix_ns=deadline_unix_ns,
    )


async def _next_chunk(stream: OutputStream) -> Chunk:
    """Wait for output. Raises RequestError if the stream failed."""
    while True:
        if stream.waits_for_usage and not stream.ready.is_set():
            # The client has all its text; the numbers may be late, but not for ever.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stream.ready.wait(), _USAGE_TIMEOUT_S)
            stream.settle()
        await stream.ready.wait()
        stream.ready.clear()
        if (chunk := stream.take()) is not None:
            return chunk


def _note_ending(record: RequestRecord, ending: Ending | None) -> None:
    if ending is not None:
        record.finish_reason = pb.FinishReason.Name(ending.reason).removeprefix("FINISH_REASON_")


def _response(stream: OutputStream, record: RequestRecord, chunk: Chunk) -> bytes:
    response = pb.GenerateResponse(
        request_id=record.request_id, text=chunk.text, token_ids=chunk.token_ids
    )
    _set_ending(response, chunk.ending)
    _set_usage(response, stream, record, chunk.usage)
    return response.SerializeToString()


def _set_ending(target: pb.GenerateResponse | pb.Choice, ending: Ending | None) -> None:
    if ending is None:
        return
    target.finish_reason = ending.reason
    if ending.stop_token_id is not None:
        target.stop_reason.token_id = ending.stop_token_id
    if ending.stop_string is not None:
        target.stop_reason.string = ending.stop_string


def _set_usage(
    target: pb.GenerateResponse | pb.GenerateUnaryResponse,
    stream: OutputStream,
    record: RequestRecord,
    usage: EngineUsage | None,
) -> None:
    if usage is None:
        return
    target.usage.prompt_tokens = record.num_prompt_tokens
    target.usage.output_tokens = stream.num_output_tokens
    target.usage.cached_tokens = usage.num_cached_tokens
    target.usage.seed = record.seed
    target.usage.preemptions = usage.num_preemptions

"""blockyard.v1.GenerateService: admission, streaming, ends.

Requests and responses are bytes to the server: a malformed request then gets a clear status, and a
response is serialised once. Nothing is sent before admission, the engine's included,
so errors until then are Trailers-Only and clients may retry them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc
import grpc.aio
from opentelemetry.trace import Tracer

from blockyard.common.columns import pack_u32
from blockyard.common.model_dir import ModelDir
from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import Reason, RequestError, invalid, too_long
from scheduler_svc.frontend import status, validation
from scheduler_svc.frontend.chat_template import ChatTemplateError
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.fanout import Fanout
from scheduler_svc.frontend.limits import RequestLimits
from scheduler_svc.frontend.metrics import FrontendMetrics
from scheduler_svc.frontend.output_stream import Output, OutputOptions, OutputStream
from scheduler_svc.frontend.parsing import parse
from scheduler_svc.frontend.request_log import RequestRecord
from scheduler_svc.frontend.responses import UnaryResponse, stream_responses
from scheduler_svc.frontend.tokenizer import PromptTokenizer
from scheduler_svc.frontend.tracing import RequestTrace, cancelled_status
from scheduler_svc.frontend.validation import Wanted

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerateService"].full_name

_USAGE_TIMEOUT_S: Final = 1.0
"""How long a finished client waits for the engine's numbers after a stop string."""

_NO_DEADLINE_S: Final = 1e9
"""gRPC reports an absent deadline as one centuries away."""

log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[bytes, bytes]
_Result = TypeVar("_Result")


class GenerateApi:
    """The public methods."""

    def __init__(
        self,
        model: ModelDir,
        tokenizer: PromptTokenizer,
        link: EngineLink,
        fanout: Fanout,
        metrics: FrontendMetrics,
        *,
        version: str,
        limits: RequestLimits,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._model = model
        self._tokenizer = tokenizer
        self._link = link
        self._fanout = fanout
        self._metrics = metrics
        self._version = version
        self._limits = limits

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
                output = await _next_output(stream, record)
                for response in stream_responses(output, stream, record):
                    await stream.write(context.write, response)
                self._metrics.sent(output.chunks)
                if output.usage is not None:
                    return

        await self._serve(data, context, respond, is_streamed=True)

    async def generate_unary(self, data: bytes, context: _Context) -> bytes:
        """GenerateUnary: one answer at the end."""

        async def respond(stream: OutputStream, record: RequestRecord) -> bytes:
            response = UnaryResponse()
            while True:
                output = await _next_output(stream, record)
                response.add(output)
                if output.usage is not None:
                    return response.serialise(output.usage, stream, record)

        return await self._serve(data, context, respond, is_streamed=False)

    async def get_model(self, data: bytes, context: _Context) -> bytes:
        """GetModel: UNAVAILABLE until the engine is known."""
        try:
            parse(pb.GetModelRequest, data)
            state = self._engine_state()
        except RequestError as error:
            await status.abort(context, error)
        return pb.GetModelResponse(
            name=self._model.name,
            digest=self._model.digest,
            vocab_size=self._model.vocab_size,
            max_model_len=state.max_model_len,
            has_chat_template=self._tokenizer.has_chat_template,
            eos_token_ids=self._model.eos_token_ids,
            version=self._version,
            max_branches=state.max_branches,
            device=state.device,
        ).SerializeToString()

    async def _serve(
        self,
        data: bytes,
        context: _Context,
        respond: Callable[[OutputStream, RequestRecord], Awaitable[_Result]],
        *,
        is_streamed: bool,
    ) -> _Result:
        """The edge of a request: admits it, turns errors into statuses, always cleans up."""
        record = RequestRecord("Generate" if is_streamed else "GenerateUnary")
        trace = RequestTrace.begin(self._tracer, self._model.name)
        if trace is not None:
            record.trace_id = trace.trace_id
        stream: OutputStream | None = None
        try:
            stream = await self._admit(data, context, record, trace, is_streamed=is_streamed)
            return await respond(stream, record)
        except RequestError as error:
            record.status, record.reason = error.code.name, error.reason
            await status.abort(context, error)
        except asyncio.CancelledError:
            record.status = cancelled_status(context).name
            raise
        except Exception:
            # The service edge: whatever else goes wrong ends this request alone.
            log.exception("request %s failed", record.request_id)
            failure = RequestError(Reason.INTERNAL_ERROR, "internal error of the front end")
            record.status, record.reason = failure.code.name, failure.reason
            await status.abort(context, failure)
        finally:
            if stream is not None:
                self._link.stop(self._fanout.close(stream))
            record.write(stream)
            self._metrics.ended(record, stream)
            if trace is not None:
                trace.end(record, stream)

    async def _admit(
        self,
        data: bytes,
        context: _Context,
        record: RequestRecord,
        trace: RequestTrace | None,
        *,
        is_streamed: bool,
    ) -> OutputStream:
        """Check, tokenise and submit. Raises RequestError."""
        self._limits.check_bytes(len(data))
        request = parse(pb.GenerateRequest, data)
        record.request_id = validation.check_request_id(request)
        if request.HasField("chat"):
            record.operation = "chat"
        state = self._engine_state()
        wanted = validation.check(request, self._model, state.max_branches)
        record.seed = wanted.sampling.seed
        prompt = await self._tokenise(request, state.max_model_len)
        record.num_prompt_tokens = len(prompt)
        self._limits.check_prompt(len(prompt))
        # Tokenising took time: the engine may have come, gone or changed.
        max_model_len = self._engine_state().max_model_len
        validation.check_length(len(prompt), wanted.stopping.max_tokens, max_model_len)
        stream = self._fanout.open(
            self._output_options(wanted, has_text=not request.skip_text, is_streamed=is_streamed)
        )
        submit = _submit(stream.key, prompt, wanted, _deadline_unix_ns(context))
        if trace is not None:
            is_chat = request.HasField("chat")
            trace.submitted(submit, is_chat=is_chat, is_streamed=is_streamed)
        self._link.submit(submit)
        return stream

    def _output_options(
        self, wanted: Wanted, *, has_text: bool, is_streamed: bool
    ) -> OutputOptions:
        is_beam = wanted.choices.beam is not None
        # Most of a beam search's output comes at once, at its end, whoever reads it.
        is_bounded = is_streamed and not is_beam
        return OutputOptions(
            num_choices=wanted.choices.num_choices,
            is_beam=is_beam,
            vocabulary=self._tokenizer.vocabulary if has_text else None,
            stop_token_ids=wanted.stopping.token_ids,
            stop_strings=wanted.stopping.strings,
            max_buffered_tokens=self._limits.max_buffered_tokens if is_bounded else None,
            is_streamed=is_streamed,
        )

    def _engine_state(self) -> engine_pb.EngineState:
        state = self._link.state
        if state is None:
            raise RequestError(
                Reason.NOT_READY, "the engine is not ready yet; retry", retry_delay_s=1.0
            )
        return state

    async def _tokenise(self, request: pb.GenerateRequest, max_model_len: int) -> list[int]:
        """Token ids of the input; text that cannot fit is refused before any work is done."""
        kind = request.WhichOneof("input")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        num_chars = len(request.prompt) + sum(len(m.content) for m in request.chat.messages)
        self._limits.check_text(num_chars, self._tokenizer.max_text_chars)
        if num_chars > self._tokenizer.max_text_chars(max_model_len):
            raise too_long(
                kind or "input",
                f"{kind}: {num_chars} characters are more than the {max_model_len} tokens that "
                "prompt and output may have together",
            )
        if kind == "prompt":
            return await self._tokenizer.encode_prompt(request.prompt)
        if not self._tokenizer.has_chat_template:
            raise invalid(
                "chat", "cannot be used: the model has no chat template; send prompt or token_ids"
            )
        messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
        try:
            return await self._tokenizer.encode_chat(messages)
        except ChatTemplateError as error:
            raise invalid("chat", f"does not fit the chat template: {error}") from error


def _deadline_unix_ns(context: _Context) -> int:
    """0: the client set none."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None or remaining_s > _NO_DEADLINE_S:
        return 0
    return time.time_ns() + int(remaining_s * 1e9)


def _submit(key: int, prompt: list[int], wanted: Wanted, deadline_unix_ns: int) -> engine_pb.Submit:
    sampling, stopping, beam = wanted.sampling, wanted.stopping, wanted.choices.beam
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
        num_samples=wanted.choices.num_choices if beam is None else 0,
        beam=beam,
        num_logprobs=wanted.num_logprobs,
        cache_salt=wanted.cache.salt,
        cache_off=wanted.cache.off,
        priority=wanted.priority,
        stop_strings=stopping.strings if beam is not None else (),
    )


async def _next_output(stream: OutputStream, record: RequestRecord) -> Output:
    """Wait for output. Raises RequestError if the stream failed."""
    while True:
        if stream.waits_for_usage and not stream.ready.is_set():
            # The client has all its text; the numbers may be late, but not for ever.
            try:
                await asyncio.wait_for(stream.ready.wait(), _USAGE_TIMEOUT_S)
            except TimeoutError:
                stream.settle()
        await stream.ready.wait()
        stream.ready.clear()
        if (output := stream.take()) is not None:
            for chunk in output.chunks:
                if chunk.ending is not None:
                    record.note_ending(chunk.ending)
            return output

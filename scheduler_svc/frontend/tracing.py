"""Spans of the front end: the RPC's own, `llm_request` under it, and what the front end did.

`docs/tracing.md` has the tree and the attributes. Nothing here holds text or token ids. Of a
request that is not sampled only the RPC's span is ever made, and that records nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Self, TypeAlias

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from blockyard.engine.v1 import engine_pb2 as engine_pb
from scheduler_svc.frontend.output_stream import OutputStream
from scheduler_svc.frontend.request_log import RequestRecord
from scheduler_svc.telemetry.clock import unix_offset_ns

SERVICE: Final = "blockyard-frontend"

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_HEADERS: Final = frozenset({"traceparent", "tracestate"})

_ERRORS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Statuses that are the server's failures by OpenTelemetry's conventions; others are answers."""

_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}

_DEADLINE_SLACK_S: Final = 0.05
"""A client's own timer ends the call a little before ours, which began when the call arrived."""

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs only
_Behaviour = Callable[[Any, _Context], Awaitable[Any]]


def cancelled_status(context: _Context) -> grpc.StatusCode:
    """What the client sees of a call that is being cancelled."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is not None and remaining_s <= _DEADLINE_SLACK_S:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


class RpcTracing(grpc.aio.ServerInterceptor):
    """The SERVER span of each call of one service: parent from the metadata, status as sent.

    For behaviours that take one request and are coroutines, as ours are.
    """

    def __init__(self, tracer: Tracer, service_name: str, sample_ratio: float) -> None:
        """Trace the methods of `service_name`, e.g. blockyard.v1.GenerateService.

        Args:
            tracer: samples every trace that begins with it.
            service_name: full.
            sample_ratio: of the calls whose client does not say. The others cost nothing more.
        """
        self._tracer = tracer
        self._sample_ratio = sample_ratio
        self._prefix = f"/{service_name}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the behaviour of this call."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix) or handler.request_streaming:
            return handler  # type: ignore[no-any-return]  # handler has no public type
        parent = parent_context(handler_call_details.invocation_metadata or ())
        if not parent and random.random() >= self._sample_ratio:
            return handler  # type: ignore[no-any-return]  # as above
        if handler.response_streaming:
            make: Any = grpc.unary_stream_rpc_method_handler
            behaviour = handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return make(  # type: ignore[no-any-return]  # as above
            self._traced(behaviour, method, parent),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _traced(self, behaviour: _Behaviour, method: str, parent: Context) -> _Behaviour:
        async def call(request: Any, context: _Context) -> Any:
            span = self._tracer.start_span(
                method[1:],
                parent,
                SpanKind.SERVER,
                {"rpc.system.name": "grpc", "rpc.method": method[1:]},
            )
            status = "UNKNOWN"
            try:
                with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                    response = await behaviour(request, context)
                status = _status_set(context) or "OK"
                return response
            except asyncio.CancelledError:
                status = cancelled_status(context).name
                raise
            except BaseException:  # an abort, or what gRPC answers with UNKNOWN; not ours to end
                status = _status_set(context) or "UNKNOWN"
                raise
            finally:
                span.set_attribute("rpc.response.status_code", status)
                _set_status(span, status)
                span.end()

        return call


def parent_context(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The W3C trace context of a call's metadata; empty if there is none, or none that is valid."""
    carrier = {key: value for key, value in metadata if key in _HEADERS and isinstance(value, str)}
    return _PROPAGATOR.extract(carrier, Context()) if carrier else Context()


def _status_set(context: _Context) -> str:
    """The status that the behaviour chose; empty: none."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _NAMES.get(code, "UNKNOWN") if code else ""


def _set_status(span: Span, status: str) -> None:
    if status in _ERRORS:
        span.set_status(Status(StatusCode.ERROR, status))
        span.set_attribute("error.type", status)


class RequestTrace:
    """`llm_request` of one sampled call, filled in while it is served."""

    def __init__(self, tracer: Tracer, model_name: str) -> None:
        """Begin under the current span."""
        self._tracer = tracer
        self._start_ns = time.time_ns()
        self._submitted_ns = 0
        self._span = tracer.start_span(
            "llm_request",
            start_time=self._start_ns,
            attributes={
                "gen_ai.provider.name": "blockyard",
                "gen_ai.request.model": model_name,
                "gen_ai.response.model": model_name,
            },
        )
        self._context = trace.set_span_in_context(self._span)

    @classmethod
    def begin(cls, tracer: Tracer | None, model_name: str) -> Self | None:
        """None if nothing is traced, or this call is not."""
        if tracer is None or not trace.get_current_span().is_recording():
            return None
        return cls(tracer, model_name)

    @property
    def trace_id(self) -> bytes:
        """W3C [16]."""
        return self._span.get_span_context().trace_id.to_bytes(16, "big")

    def submitted(self, submit: engine_pb.Submit, *, is_chat: bool, is_streamed: bool) -> None:
        """The request goes to the engine now, with its place in the trace."""
        self._submitted_ns = time.time_ns()
        context = self._span.get_span_context()
        submit.trace.trace_id = context.trace_id.to_bytes(16, "big")
        submit.trace.parent_span_id = context.span_id.to_bytes(8, "big")
        submit.trace.sent_unix_ns = self._submitted_ns
        num_choices = submit.beam.num_returned or submit.num_samples or 1
        self._span.set_attributes(
            {
                "gen_ai.operation.name": "chat" if is_chat else "text_completion",
                "gen_ai.request.max_tokens": submit.max_tokens,
                "gen_ai.request.temperature": submit.temperature,
                "gen_ai.request.top_p": submit.top_p,
                "gen_ai.request.top_k": submit.top_k,
                "gen_ai.request.n": num_choices,
                "gen_ai.request.choice.count": num_choices,
                "gen_ai.request.stream": is_streamed,
            }
        )
        if submit.HasField("beam"):
            self._span.set_attribute("blockyard.request.beam_width", submit.beam.width)

    def end(self, record: RequestRecord, stream: OutputStream | None) -> None:
        """The call is over; `stream` is None if it was refused before it had one.

        Spans are made once the status is on its way.
        """
        asyncio.get_running_loop().call_soon(self._write, record, stream, time.time_ns())

    def _write(self, record: RequestRecord, stream: OutputStream | None, end_ns: int) -> None:
        self._child("tokenize", self._start_ns, self._submitted_ns or end_ns)
        span = self._span
        if stream is not None and stream.first_token_ns is not None:
            first_ns = stream.first_token_ns + unix_offset_ns()
            self._child("stream", first_ns, end_ns)
            span.set_attributes(self._latencies(first_ns, end_ns, stream))
        elif self._submitted_ns:
            self._child("wait", self._submitted_ns, end_ns)
        span.set_attributes(
            {
                # Two names each: of the GenAI conventions and as vLLM has them.
                "gen_ai.response.id": record.request_id,
                "gen_ai.request.id": record.request_id,
                "gen_ai.request.seed": str(record.seed),  # has 63 bits, more than a JSON number
                "gen_ai.response.finish_reasons": [r.lower() for r in record.finish_reasons],
                "gen_ai.usage.input_tokens": record.num_prompt_tokens,
                "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
                "gen_ai.latency.e2e": (end_ns - self._start_ns) / 1e9,
                "blockyard.status": record.status,
            }
        )
        if stream is not None:
            span.set_attribute("gen_ai.usage.output_tokens", stream.num_output_tokens)
            span.set_attribute("gen_ai.usage.completion_tokens", stream.num_output_tokens)
            span.set_attributes(_usage(stream))
        _set_status(span, record.status)
        span.end(end_ns)

    def _child(self, name: str, start_ns: int, end_ns: int) -> None:
        self._tracer.start_span(name, self._context, start_time=start_ns).end(end_ns)

    def _latencies(self, first_ns: int, end_ns: int, stream: OutputStream) -> dict[str, float]:
        """Seconds, as clients of this front end felt them."""
        first_token_s = (first_ns - self._start_ns) / 1e9
        latencies = {
            "gen_ai.latency.time_to_first_token": first_token_s,
            "gen_ai.response.time_to_first_chunk": first_token_s,
            "gen_ai.latency.time_in_model_decode": (end_ns - first_ns) / 1e9,
        }
        if (usage := stream.usage) is not None:
            prefill_ns = max(0, first_ns - self._submitted_ns - usage.queue_ns)
            latencies["gen_ai.latency.time_in_queue"] = usage.queue_ns / 1e9
            latencies["gen_ai.latency.time_in_model_prefill"] = prefill_ns / 1e9
            inference_s = (prefill_ns + end_ns - first_ns) / 1e9
            latencies["gen_ai.latency.time_in_model_inference"] = inference_s
        return latencies


def _usage(stream: OutputStream) -> dict[str, float]:
    """What only the engine knows; nothing of a request that ended before the engine said so."""
    usage = stream.usage
    if usage is None:
        return {}
    blocks = usage.blocks
    return {
        "gen_ai.usage.cache_read.input_tokens": usage.num_cached_tokens,
        "blockyard.preemptions": usage.num_preemptions,
        "blockyard.recoveries": usage.num_recoveries,
        "blockyard.block_seconds": blocks.block_seconds,
        "blockyard.blocks.shared": blocks.num_shared,
        "blockyard.blocks.copied": blocks.num_copied,
        "blockyard.blocks.swapped_out": blocks.num_swapped_out,
        "blockyard.blocks.swapped_in": blocks.num_swapped_in,
    }

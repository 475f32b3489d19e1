"""Running something around every call of a server, with what is known of its peer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs only

Guard = Callable[[Context], contextlib.AbstractAsyncContextManager[None]]
"""Entered before a call is handled; it may abort the call instead. Left when the call ends."""

_KINDS: Final = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def guarded(handler: Handler, guard: Guard) -> Handler:
    """The same handler behind a guard. Its behaviour is a coroutine or an async generator."""
    known: Any = handler
    name, make = _KINDS[known.request_streaming, known.response_streaming]
    behaviour = getattr(known, name)
    wrap: Any = _generator if inspect.isasyncgenfunction(behaviour) else _coroutine
    make_any: Any = make
    return make_any(  # type: ignore[no-any-return]  # the handler has no public type
        wrap(behaviour, guard), known.request_deserializer, known.response_serializer
    )


def _coroutine(behaviour: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    async def call(request: Any, context: Context) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    return call


def _generator(behaviour: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        async with guard(context), contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return call


_SPIFFE_ID: Final = "peer_spiffe_id"
_NAMES: Final = "x509_subject_alternative_name"
_COMMON_NAME: Final = "x509_common_name"


def certified_names(auth: Mapping[str, Iterable[bytes]]) -> list[str]:
    """What a peer's certificate is for: its SPIFFE id, then all other names; [] without one.

    `auth` is what a call's context knows of its peer. The common name is no proof of anything.
    """
    names = [name.decode() for key in (_SPIFFE_ID, _NAMES) for name in auth.get(key, ())]
    return list(dict.fromkeys(names))


class PeerAllowList(grpc.aio.ServerInterceptor):
    """Refuses calls of peers whose certificate has none of the names that may call."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: DNS names, IP addresses or URIs such as SPIFFE ids, compared as they are."""
        self._names = frozenset(names)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Look at the peer before each call is handled."""
        handler = await continuation(handler_call_details)
        return guarded(handler, self._admit) if handler is not None else None

    @contextlib.asynccontextmanager
    async def _admit(self, context: Context) -> AsyncIterator[None]:
        names = certified_names(context.auth_context())
        if self._names.isdisjoint(names):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {', '.join(names) or 'nobody'} may not call here",
            )
        yield

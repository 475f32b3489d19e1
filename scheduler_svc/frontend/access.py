"""Who may call the public API, and how many calls of one client may be open."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from blockyard.common.guards import Context, Handler, certified_names, guarded
from blockyard.common.logs import event
from blockyard.common.reloading import Reloading
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.frontend import status
from scheduler_svc.frontend.tokens import Tokens, load_tokens

CLIENT: Final[ContextVar[str]] = ContextVar("client", default="")
"""Name of the client whose call is being handled; empty outside of calls."""

_OPEN_TO_ALL: Final = "/grpc.health.v1.Health/"
"""Probes and proxies have no tokens."""
_SCHEME: Final = "bearer "
_LOOK_EVERY_S: Final = 1.0

log = logging.getLogger(__name__)


class ClientAccess(grpc.aio.ServerInterceptor):
    """Finds out who calls, and refuses whom it does not know or who has too many calls open.

    A client is known by its token if the server has a token file, else by its certificate if it
    showed one, else by its address. Health checks pass.
    """

    def __init__(self, token_file: Path | None, max_streams: int | None) -> None:
        """Read the token file. Raises FileError.

        Args:
            token_file: looked at again while the server runs; None: nobody needs a token.
            max_streams: calls that one client may have open; None: any number.
        """
        self._tokens: Reloading[Tokens] | None = None
        if token_file is not None:
            load = partial(load_tokens, token_file)
            self._tokens = Reloading([token_file], load, look_every_s=_LOOK_EVERY_S)
        self._max_streams = max_streams
        self._num_open: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Put a guard before the call's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_TO_ALL):
            return handler  # type: ignore[no-any-return]  # handler has no public type
        token = _bearer_token(handler_call_details.invocation_metadata or ())
        return guarded(handler, partial(self._admit, token))

    @contextlib.asynccontextmanager
    async def _admit(self, token: str, context: Context) -> AsyncIterator[None]:
        client = ""
        try:
            client = self._client_of(token, context)
            self._check_room(client)
        except RequestError as error:
            event(log, "refused", reason=error.reason, client=client or _address_of(context))
            await status.abort(context, error)
        CLIENT.set(client)
        self._num_open[client] += 1
        try:
            yield
        finally:
            self._num_open[client] -= 1
            if not self._num_open[client]:
                del self._num_open[client]

    def _client_of(self, token: str, context: Context) -> str:
        """The caller's name. Raises RequestError."""
        if self._tokens is None:
            names = certified_names(context.auth_context())
            return names[0] if names else _address_of(context)
        if not token:
            message = "no token: send one as the metadata `authorization: Bearer ...`"
            raise RequestError(Reason.UNAUTHENTICATED, message)
        client = self._tokens.get().client_of(token)
        if client is None:
            raise RequestError(Reason.UNAUTHENTICATED, "the token is not one of a client's")
        return client

    def _check_room(self, client: str) -> None:
        if self._max_streams is not None and self._num_open[client] >= self._max_streams:
            raise RequestError(
                Reason.TOO_MANY_STREAMS,
                f"{client} has {self._max_streams} calls open, as many as it may",
                subject=f"open calls of {client}",
            )


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token that a call came with; empty: none, or not exactly one."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, token = values[0][: len(_SCHEME)], values[0][len(_SCHEME) :]
    return token.strip() if scheme.lower() == _SCHEME else ""


def _address_of(context: Context) -> str:
    """The peer's host, without its port; "unix" for all that come over a unix socket."""
    kind, _, address = context.peer().partition(":")
    if kind == "unix":
        return kind
    host: str = address.rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")

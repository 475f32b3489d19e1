"""Channel and server options of every gRPC endpoint, in one place."""

from __future__ import annotations

from typing import Any, Final

import grpc

_MIB = 1 << 20

Options = list[tuple[str, int]]

MAX_PENDING_CALLS: Final = 50_000
"""Calls that a front end may have been sent and not begun to handle."""

LINK_OPTIONS: Final[Options] = [
    # Internal links carry whole prompts of many requests in one frame.
    ("grpc.max_receive_message_length", 256 * _MIB),
    ("grpc.max_send_message_length", 256 * _MIB),
    ("grpc.so_reuseport", 0),
    # Whatever $http_proxy says.
    ("grpc.enable_http_proxy", 0),
    # Peers come back within a second of a restart; do not back off for minutes. The least one is
    # also how long a connection attempt may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
"""For engine <-> executor and front end <-> engine, both sides."""


NOBODY_LISTENS: Final = "failed to connect to all addresses"
"""In gRPC's details of such an error, which go on at length."""


def short_reason(error: grpc.RpcError, target: str) -> str:
    """The status of a call to `target` and what is said of it, in one short line."""
    call: Any = error  # calls raise objects that are RpcError and Call at once
    details = call.details() or ""
    if NOBODY_LISTENS in details:
        details = f"nobody listens at {target}"
    return f"{call.code().name}: {details}"


def public_server_options(max_request_bytes: int, *, reuse_port: bool) -> Options:
    """Options of a front end's public server.

    Args:
        max_request_bytes: larger requests get RESOURCE_EXHAUSTED from gRPC itself.
        reuse_port: several front ends share the port; without it a port clash must fail.
    """
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.so_reuseport", int(reuse_port)),
        # gRPC itself drops calls of a burst before anybody sees them; the engine's queue has a
        # limit of its own, and an answer for those beyond it.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]

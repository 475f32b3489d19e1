"""Channel and server options of every gRPC endpoint, in one place."""

from __future__ import annotations

from typing import Any, Final

import grpc

from blockyard.common.listen_address import socket_path
from blockyard.common.tls import handshake_problem

_MIB = 1 << 20

Options = list[tuple[str, int]]

MAX_PENDING_CALLS: Final = 50_000
"""Calls that a front end may have been sent and not begun to handle."""

_TAKE_PINGS: Final[Options] = [
    # For servers: peers may ping each second, whether or not they have calls.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]


def keepalive(interval_s: float, timeout_s: float) -> Options:
    """Options of either side that pings its peer.

    Args:
        interval_s: how long the peer may be silent before that [s].
        timeout_s: how long it may take to answer; then the connection is closed [s].
    """
    return [
        ("grpc.keepalive_time_ms", int(interval_s * 1e3)),
        ("grpc.keepalive_timeout_ms", int(timeout_s * 1e3)),
        # That one is for peers that send nothing; without this, an answer may take a minute.
        ("grpc.http2.ping_timeout_ms", int(timeout_s * 1e3)),
        # A stream that waits for its first token carries no data.
        ("grpc.http2.max_pings_without_data", 0),
    ]


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
    *keepalive(10.0, 10.0),
    *_TAKE_PINGS,
]
"""For engine <-> executor and front end <-> engine, both sides."""


NOBODY_LISTENS: Final = "failed to connect to all addresses"
"""In gRPC's details of such an error, which go on at length."""


def short_reason(error: grpc.RpcError, target: str) -> str:
    """The status of a call to `target` and what is said of it, in one short line."""
    call: Any = error  # calls raise objects that are RpcError and Call at once
    details = call.details() or ""
    problem = handshake_problem(details) if socket_path(target) is None else None
    if problem is not None:
        details = f"no connection to {target}: {problem}"
    elif NOBODY_LISTENS in details:
        details = f"nobody listens at {target}"
    return f"{call.code().name}: {details}"


def public_server_options(
    max_request_bytes: int,
    *,
    reuse_port: bool,
    keepalive: Options,
    max_connection_age_s: float | None = None,
) -> Options:
    """Options of a front end's public server.

    Args:
        max_request_bytes: larger requests get RESOURCE_EXHAUSTED from gRPC itself.
        reuse_port: several front ends share the port; without it a port clash must fail.
        keepalive: from the function of that name.
        max_connection_age_s: connections older than this take no new streams; those on them go on
            as long as they like. None: for ever.
    """
    # The library spreads ages by a tenth; no grace means an unlimited one.
    age = max_connection_age_s
    return [
        *([] if age is None else [("grpc.max_connection_age_ms", int(age * 1e3))]),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.so_reuseport", int(reuse_port)),
        # gRPC itself drops calls of a burst before anybody sees them; the engine's queue has a
        # limit of its own, and an answer for those beyond it.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        *keepalive,
        *_TAKE_PINGS,
    ]

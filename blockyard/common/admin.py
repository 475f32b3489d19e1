"""The address for whoever runs a process: its health and channelz, in the clear.

For probes that can do neither TLS nor certificates. It tells addresses of peers: keep others out.
"""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.common.listen_address import bind

_NAMES: Final = (
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
    reflection.SERVICE_NAME,
)


def admin_server(health: health_pb2_grpc.HealthServicer, address: str) -> grpc.aio.Server:
    """A server of health, channelz and reflection that is bound, but not started.

    Args:
        health: of this process.
        address: unix:/path or host:port; empty: the server listens nowhere.

    Raises ListenError.
    """
    server = grpc.aio.server(options=LINK_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection(_NAMES, server)
    if address:
        bind(server, address, is_private=True)
    return server

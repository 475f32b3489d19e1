"""Envoy as a mesh would run it beside us: least request, health checks, retries, faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from integration_tests.mesh.peer import free_port, running_peer
from integration_tests.mesh.tools import ENVOY, need

CLUSTER_HEADER: Final = "x-cluster"
"""A request that carries it goes to the cluster of that name; others go to the first one."""

HEALTH_INTERVAL_S: Final = 0.25
_TYPE: Final = "type.googleapis.com/envoy.extensions"


class Envoy:
    """A running Envoy."""

    def __init__(self, port: int, admin_port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._admin = f"http://127.0.0.1:{admin_port}"

    async def stat(self, name: str) -> int:
        """A counter or a gauge; 0 before it is first used."""
        stats = (await self._get(f"/stats?format=json&filter=^{name}$"))["stats"]
        return sum(int(each["value"]) for each in stats)

    async def hosts(self, cluster: str) -> dict[int, dict[str, Any]]:
        """By port: `healthy`, and the host's counters by name."""
        statuses = (await self._get("/clusters?format=json"))["cluster_statuses"]
        (found,) = (each for each in statuses if each["name"] == cluster)
        return {
            host["address"]["socket_address"]["port_value"]: {
                "healthy": not host["health_status"].get("failed_active_health_check", False),
                **{each["name"]: int(each.get("value", 0)) for each in host["stats"]},
            }
            for host in found.get("host_statuses", [])
        }

    async def until_healthy(self, cluster: str, ports: Sequence[int]) -> None:
        """Wait until just these hosts of the cluster pass their health checks."""
        async with asyncio.timeout(20):
            while True:
                hosts = await self.hosts(cluster)
                if sorted(port for port in hosts if hosts[port]["healthy"]) == sorted(ports):
                    return
                await asyncio.sleep(0.05)

    async def _get(self, path: str) -> Any:
        def get() -> Any:
            with urllib.request.urlopen(self._admin + path, timeout=10) as answer:
                return json.load(answer)

        return await asyncio.to_thread(get)


@contextlib.asynccontextmanager
async def running_envoy(
    directory: Path, clusters: Mapping[str, Sequence[int]], health_name: str = ""
) -> AsyncIterator[Envoy]:
    """Envoy in front of servers on 127.0.0.1, or skip the test.

    Args:
        directory: for its configuration and log.
        clusters: ports of the servers by cluster name; the first one is health checked.
        health_name: which service the health checks ask for.
    """
    binary = need(ENVOY)
    envoy_port, admin_port = free_port(), free_port()
    path = directory / "envoy.json"
    path.write_text(json.dumps(_bootstrap(envoy_port, admin_port, clusters, health_name)))
    flags = ["--concurrency", 1, "--disable-hot-restart", "--log-level", "warning"]
    command = [binary, "-c", path, *flags]
    async with running_peer(directory, "envoy", command, envoy_port):
        yield Envoy(envoy_port, admin_port)


def _bootstrap(
    port: int, admin_port: int, clusters: Mapping[str, Sequence[int]], health_name: str
) -> dict[str, Any]:
    first, *others = clusters
    routes = [*({"name": name, "header": name} for name in others), {"name": first, "header": ""}]
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "public",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [_route(each["name"], each["header"]) for each in routes],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.fault",
                "typed_config": {
                    "@type": f"{_TYPE}.filters.http.fault.v3.HTTPFault",
                    # Faults are asked for in the request's headers.
                    "abort": {"header_abort": {}, "percentage": {"numerator": 100}},
                    "delay": {"header_delay": {}, "percentage": {"numerator": 100}},
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            },
        ],
    }
    listener = {
        "name": "public",
        "address": _address(port),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }
    return {
        "admin": {"address": _address(admin_port)},
        "static_resources": {
            "listeners": [listener],
            "clusters": [
                _cluster(name, ports, health_name if name == first else None)
                for name, ports in clusters.items()
            ],
        },
    }


def _route(cluster: str, header: str) -> dict[str, Any]:
    match: dict[str, Any] = {"prefix": "/"}
    if header:
        match["headers"] = [{"name": CLUSTER_HEADER, "string_match": {"exact": header}}]
    return {
        "match": match,
        "route": {
            "cluster": cluster,
            "timeout": "0s",
            "retry_policy": {
                "retry_on": "connect-failure,refused-stream,unavailable,reset-before-request",
                "num_retries": 3,
                "host_selection_retry_max_attempts": 10,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {
                            "@type": f"{_TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                        },
                    }
                ],
            },
        },
    }


def _cluster(name: str, ports: Sequence[int], health_name: str | None) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        # Three retries at a time, the default, are not enough when a host leaves.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _address(port)}} for port in ports]}
            ],
        },
    }
    if health_name is not None:
        interval = f"{HEALTH_INTERVAL_S}s"
        cluster["health_checks"] = [
            {
                "timeout": "1s",
                "interval": interval,
                "no_traffic_interval": interval,
                "unhealthy_interval": interval,
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": health_name},
            }
        ]
    return cluster


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

"""What may stand in the custom resources under deploy/k8s: the part of their schemas that we use.

A field that is not here is an error, so that a misspelt one is found without a cluster.
Gateway API v1, Istio networking and security v1, Linkerd policy v1beta3 and v1alpha1.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

Duration = Annotated[str, StringConstraints(pattern=r"^(\d+(ms|s|m|h))+$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Percent = Annotated[int, Field(ge=0, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=False
    )


class _Metadata(_Strict):
    name: Name
    namespace: Literal["blockyard"]
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Resource(_Strict):
    api_version: str
    kind: str
    metadata: _Metadata


class _Selector(_Strict):
    match_labels: Annotated[dict[str, str], Field(min_length=1)]


class _ParentRef(_Strict):
    group: Literal[""]
    kind: Literal["Service"]
    name: Name
    port: Port


class _Method(_Strict):
    service: Annotated[str, StringConstraints(pattern=r"^(?i:[a-z]\w*)(\.(?i:[a-z]\w*))*$")]
    method: str | None = None


class _Match(_Strict):
    method: _Method


class _BackendRef(_Strict):
    name: Name
    port: Port
    weight: int = 1


class _GrpcRule(_Strict):
    matches: Annotated[list[_Match], Field(max_length=64)]
    backend_refs: Annotated[list[_BackendRef], Field(min_length=1, max_length=16)]


class _GrpcRouteSpec(_Strict):
    parent_refs: Annotated[list[_ParentRef], Field(min_length=1, max_length=32)]
    rules: Annotated[list[_GrpcRule], Field(min_length=1, max_length=16)]


class GrpcRoute(_Resource):
    """gateway.networking.k8s.io/v1 GRPCRoute, of a Service."""

    spec: _GrpcRouteSpec


class _Warmup(_Strict):
    duration: Duration


class _LoadBalancer(_Strict):
    simple: Literal["LEAST_REQUEST", "ROUND_ROBIN", "RANDOM"]
    warmup: _Warmup


class _HttpPool(_Strict):
    http1_max_pending_requests: Annotated[int, Field(alias="http1MaxPendingRequests", ge=1)]
    http2_max_requests: Annotated[int, Field(alias="http2MaxRequests", ge=1)]
    max_retries: Annotated[int, Field(ge=1)]


class _ConnectionPool(_Strict):
    http: _HttpPool


class _OutlierDetection(_Strict):
    consecutive_gateway_errors: Annotated[int, Field(ge=1)]
    interval: Duration
    base_ejection_time: Duration
    max_ejection_percent: Percent


class _TrafficPolicy(_Strict):
    load_balancer: _LoadBalancer
    connection_pool: _ConnectionPool
    outlier_detection: _OutlierDetection


class _DestinationRuleSpec(_Strict):
    host: Name
    traffic_policy: _TrafficPolicy


class DestinationRule(_Resource):
    """networking.istio.io/v1 DestinationRule."""

    spec: _DestinationRuleSpec


class _Mtls(_Strict):
    mode: Literal["STRICT", "PERMISSIVE", "DISABLE"]


class _PeerAuthenticationSpec(_Strict):
    selector: _Selector
    mtls: _Mtls
    port_level_mtls: dict[Annotated[str, StringConstraints(pattern=r"^\d+$")], _Mtls] = {}


class PeerAuthentication(_Resource):
    """security.istio.io/v1 PeerAuthentication."""

    spec: _PeerAuthenticationSpec


class _Source(_Strict):
    principals: Annotated[list[str], Field(min_length=1)]


class _From(_Strict):
    source: _Source


class _Operation(_Strict):
    ports: Annotated[list[str], Field(min_length=1)]


class _To(_Strict):
    operation: _Operation


class _Rule(_Strict):
    from_: Annotated[list[_From], Field(alias="from", min_length=1)]
    to: Annotated[list[_To], Field(min_length=1)]


class _IstioAuthorizationSpec(_Strict):
    selector: _Selector
    action: Literal["ALLOW"]
    rules: Annotated[list[_Rule], Field(min_length=1)]


class IstioAuthorizationPolicy(_Resource):
    """security.istio.io/v1 AuthorizationPolicy."""

    spec: _IstioAuthorizationSpec


class _ServerSpec(_Strict):
    pod_selector: _Selector
    port: Port
    proxy_protocol: Literal["gRPC", "HTTP/2"]


class Server(_Resource):
    """policy.linkerd.io/v1beta3 Server."""

    spec: _ServerSpec


class _IdentityRef(_Strict):
    kind: Literal["ServiceAccount"]
    name: Name


class _MeshTlsSpec(_Strict):
    identity_refs: Annotated[list[_IdentityRef], Field(min_length=1)]


class MeshTlsAuthentication(_Resource):
    """policy.linkerd.io/v1alpha1 MeshTLSAuthentication."""

    spec: _MeshTlsSpec


class _PolicyRef(_Strict):
    group: Literal["policy.linkerd.io"]
    kind: Literal["Server", "MeshTLSAuthentication"]
    name: Name


class _LinkerdAuthorizationSpec(_Strict):
    target_ref: _PolicyRef
    required_authentication_refs: Annotated[list[_PolicyRef], Field(min_length=1)]


class LinkerdAuthorizationPolicy(_Resource):
    """policy.linkerd.io/v1alpha1 AuthorizationPolicy."""

    spec: _LinkerdAuthorizationSpec


MODELS: Final[dict[tuple[str, str], type[_Resource]]] = {
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): GrpcRoute,
    ("networking.istio.io/v1", "DestinationRule"): DestinationRule,
    ("security.istio.io/v1", "PeerAuthentication"): PeerAuthentication,
    ("security.istio.io/v1", "AuthorizationPolicy"): IstioAuthorizationPolicy,
    ("policy.linkerd.io/v1beta3", "Server"): Server,
    ("policy.linkerd.io/v1alpha1", "MeshTLSAuthentication"): MeshTlsAuthentication,
    ("policy.linkerd.io/v1alpha1", "AuthorizationPolicy"): LinkerdAuthorizationPolicy,
}
"""By API version and kind."""


def is_custom(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is of one of MODELS."""
    return (manifest["apiVersion"], manifest["kind"]) in MODELS


def check(manifest: dict[str, Any]) -> None:
    """Raise pydantic.ValidationError if a custom resource has what its schema has not."""
    MODELS[manifest["apiVersion"], manifest["kind"]].model_validate(manifest)

"""Who sends traces and metrics."""

from __future__ import annotations

import os

from opentelemetry.sdk.resources import Resource

from blockyard.common.version import software_version


def service_resource(service: str, instance_id: str) -> Resource:
    """The resource of this process as `service`; `instance_id` is unique to it."""
    return Resource(
        {
            "service.namespace": "blockyard",
            "service.name": service,
            "service.version": software_version(),
            "service.instance.id": instance_id,
            "process.pid": os.getpid(),
        }
    )

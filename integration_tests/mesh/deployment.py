"""What is in compose.yaml and deploy/, and fitted to processes on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
DASHBOARD: Final = DEPLOY / "grafana/dashboards/blockyard.json"
ENVOY: Final = DEPLOY / "envoy/envoy.yaml"
PROMETHEUS: Final = DEPLOY / "prometheus/prometheus.yml"
ALERTS: Final = DEPLOY / "prometheus/alerts.yml"

_COMPARISON: Final = re.compile(r"(.+) (?:==|>|<) [\d.]+", re.DOTALL)
_GRAFANA_VALUES: Final = {"$model": ".*", "$instance": ".*", "$__rate_interval": "30s"}


def load(path: Path) -> Any:
    """A YAML file of one document."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def service_words(service: str) -> list[str]:
    """What a service of compose.yaml runs, after `python -m`: the module and its flags."""
    found = load(ROOT / "compose.yaml")["services"][service]
    entry_point = re.search(
        r"ENTRYPOINT (\[.*\])", (ROOT / found["build"]["dockerfile"]).read_text(encoding="utf-8")
    )
    assert entry_point is not None
    return [*json.loads(entry_point[1])[2:], *found["command"]]


def envoy_config(port: int, admin_port: int, clusters: Mapping[str, Sequence[int]]) -> Any:
    """Envoy's configuration with everything on 127.0.0.1.

    Args:
        port: of the public listener.
        admin_port: of Envoy's own page.
        clusters: ports of the endpoints by cluster.
    """
    config = load(ENVOY)
    config["admin"]["address"] = _loopback(admin_port)
    (listener,) = config["static_resources"]["listeners"]
    listener["address"] = _loopback(port)
    for cluster in config["static_resources"]["clusters"]:
        (endpoints,) = cluster["load_assignment"]["endpoints"]
        endpoints["lb_endpoints"] = [
            {"endpoint": {"address": _loopback(each)}} for each in clusters[cluster["name"]]
        ]
    return config


def prometheus_config(metrics_port: int, interval: str = "") -> Any:
    """Prometheus's configuration with the engine on 127.0.0.1.

    Args:
        metrics_port: the engine's.
        interval: between two scrapes and between two evaluations, e.g. 500ms; empty: as it is.
    """
    config = load(PROMETHEUS)
    config["rule_files"] = [str(PROMETHEUS.parent / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{metrics_port}"]}]
    if interval:
        config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    return config


def dashboard_queries() -> dict[str, str]:
    """Every query of the dashboard by panel and legend, with values for Grafana's variables."""
    queries = {}
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in _GRAFANA_VALUES.items():
                expression = expression.replace(variable, value)
            queries[f"{panel['title']}: {target['legendFormat']}"] = expression
    return queries


def alert_values() -> dict[str, str]:
    """By alert: the expression that its rule compares with a number."""
    values = {}
    for group in load(ALERTS)["groups"]:
        for rule in group["rules"]:
            comparison = _COMPARISON.fullmatch(rule["expr"].strip())
            assert comparison is not None, f"{rule['alert']} compares nothing with a number"
            values[rule["alert"]] = comparison[1]
    return values


def _loopback(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

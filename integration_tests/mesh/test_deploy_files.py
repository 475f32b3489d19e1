"""compose.yaml, the container files and the configurations beside them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from blockyard.common.settings import ServiceSettings
from executor_svc.config import ExecutorSettings
from integration_tests.mesh import deployment
from integration_tests.mesh.deployment import DEPLOY, ROOT, load
from integration_tests.mesh.tools import DCLINT, ENVOY, PROMTOOL, need
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.metrics.families import exported_names
from scheduler_svc.frontend.config import FrontendSettings

COMPOSE: Final = load(ROOT / "compose.yaml")
SETTINGS: Final[dict[str, type[ServiceSettings]]] = {
    "executor_svc": ExecutorSettings,
    "scheduler_svc.engine": EngineSettings,
    "scheduler_svc.frontend": FrontendSettings,
}
METRIC: Final = re.compile(r"\b(?:vllm:|blockyard_)\w+")


def run(*command: object, cwd: Path = ROOT) -> str:
    """Output of a program that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def flags_of(service: str) -> Any:
    """The settings that a service of compose.yaml runs with; flags that do not exist exit."""
    module, *flags = deployment.service_words(service)
    return SETTINGS[module].parse(flags)


def test_envoy_takes_its_configuration() -> None:
    run(need(ENVOY), "--mode", "validate", "-c", deployment.ENVOY)


def test_prometheus_takes_its_configuration_and_alerts_fire_when_they_should() -> None:
    promtool = need(PROMTOOL)
    run(promtool, "check", "config", deployment.PROMETHEUS)
    tests = deployment.ALERTS.with_name("alerts_test.yml")
    run(promtool, "test", "rules", tests, cwd=tests.parent)
    fired = set(re.findall(r'alertname="(\w+)"', tests.read_text()))
    assert fired == set(deployment.alert_values())


def test_the_compose_file_passes_its_linter() -> None:
    run(need(DCLINT), "--quiet", "compose.yaml")


@pytest.mark.parametrize(
    "queries",
    [
        deployment.dashboard_queries().values(),
        deployment.alert_values().values(),
        [(DEPLOY / "k8s/external-metrics.yaml").read_text()],
    ],
    ids=["dashboard", "alerts", "autoscalers"],
)
def test_only_exported_metrics_are_asked_for(queries: Sequence[str]) -> None:
    asked = {name for query in queries for name in METRIC.findall(query)}
    assert asked
    assert asked <= exported_names()


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    text = " ".join(deployment.dashboard_queries().values())
    ours = {re.sub("_(bucket|count|sum)$", "", n) for n in exported_names() if "blockyard_" in n}
    assert not {name for name in ours if name not in text}


def test_services_have_time_to_end_in_order() -> None:
    frontend, engine = flags_of("frontend"), flags_of("engine")
    frontend_s = frontend.lame_duck_s + frontend.drain_grace_s
    (check,) = next(
        cluster["health_checks"]
        for cluster in load(deployment.ENVOY)["static_resources"]["clusters"]
        if cluster["name"] == "frontend"
    )
    assert seconds(check["interval"]) * check["unhealthy_threshold"] < frontend.lame_duck_s
    assert frontend_s < seconds(COMPOSE["services"]["frontend"]["stop_grace_period"])
    assert frontend_s < engine.drain_grace_s
    assert engine.drain_grace_s < seconds(COMPOSE["services"]["engine"]["stop_grace_period"])
    for executor in ("executor-cpu", "executor-gpu"):
        limit_s = seconds(COMPOSE["services"][executor]["stop_grace_period"])
        assert engine.drain_grace_s < flags_of(executor).drain_grace_s < limit_s


def test_services_are_hardened_and_their_versions_are_pinned() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        if "image" in service:
            assert re.search(r":.*\d+\.\d+\.\d+$", service["image"]), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


def test_addresses_are_those_of_services() -> None:
    collector = load(DEPLOY / "otel-collector/config.yaml")
    kinds = {"receivers", "processors", "exporters"}
    for pipeline in collector["service"]["pipelines"].values():
        assert set(pipeline) == kinds
        for kind in kinds:
            assert set(pipeline[kind]) <= set(collector[kind])
    sources = load(DEPLOY / "grafana/provisioning/datasources/datasources.yaml")["datasources"]
    uids = {source["uid"] for source in sources}
    (exemplars,) = sources[0]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplars["datasourceUid"] in uids
    (job,) = load(deployment.PROMETHEUS)["scrape_configs"]
    addresses = [
        *(exporter["endpoint"] for exporter in collector["exporters"].values()),
        *(source["url"] for source in sources),
        *job["static_configs"][0]["targets"],
        flags_of("engine").otlp_endpoint,
        flags_of("frontend").otlp_endpoint,
        *(c["name"] for c in load(deployment.ENVOY)["static_resources"]["clusters"]),
    ]
    for address in addresses:
        host = re.sub(r"^https?://", "", address).split(":")[0]
        assert host in COMPOSE["services"], address


def copied(dockerfile: Path) -> list[str]:
    """What a container file takes from the build context."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()]


@pytest.mark.parametrize("service", ["scheduler", "executor"])
def test_an_image_has_what_the_package_is_built_from(service: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {*packages, "protos", "hatch_build.py", "constraints.txt", "README.md", "LICENSE"}
    assert set(copied(DEPLOY / f"Dockerfile.{service}")) == needed | {"pyproject.toml"}


def test_the_scheduler_s_image_needs_no_model_libraries(tmp_path: Path) -> None:
    """Take what the container file copies, make the stubs, and take away what it takes away."""
    dockerfile = DEPLOY / "Dockerfile.scheduler"
    ignored = shutil.ignore_patterns("__pycache__", "*_pb2*")
    for name in copied(dockerfile):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    run(sys.executable, "hatch_build.py", cwd=tmp_path)
    removed = re.search(r"rm -rf (.+)", dockerfile.read_text())
    assert removed is not None
    for name in removed[1].split():
        shutil.rmtree(tmp_path / name)
    program = (
        "import json, sys, scheduler_svc.engine.__main__, scheduler_svc.frontend.__main__ as main\n"
        "print(json.dumps([main.__file__, sorted(m.split('.')[0] for m in sys.modules)]))"
    )
    file, modules = json.loads(run(sys.executable, "-c", program, cwd=tmp_path))
    assert file.startswith(str(tmp_path))
    absent = {"torch", "transformers", "numba", "safetensors", "gguf", "cupy", "cupy_kernels"}
    assert not absent & set(modules)
    assert "executor_svc" not in modules

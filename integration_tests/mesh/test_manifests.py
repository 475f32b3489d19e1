"""The Kubernetes manifests: valid, in step with the processes' flags, and safe to drain."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pydantic
import pytest
import yaml

from blockyard.common.link_security import LinkSettings
from executor_svc.config import ExecutorSettings
from executor_svc.server import SERVICE_NAME as EXECUTOR_SERVICE
from integration_tests.mesh import custom_resources
from integration_tests.mesh.deployment import DEPLOY, ROOT, load
from integration_tests.mesh.tools import KUBECTL, KUBERNETES_VALIDATE, need
from scheduler_svc.config import EngineSettings
from scheduler_svc.frontend.api import SERVICE_NAME as PUBLIC_SERVICE
from scheduler_svc.frontend.config import FrontendSettings
from scheduler_svc.health import LIVENESS

K8S: Final = DEPLOY / "k8s"
COMPONENTS: Final = {
    "base": [],
    "gpu": ["gpu"],
    "istio": ["istio"],
    "linkerd": ["linkerd"],
    "gpu in istio": ["gpu", "istio"],
}
SETTINGS: Final[dict[str, type[LinkSettings]]] = {
    "executor": ExecutorSettings,
    "engine": EngineSettings,
    "frontend": FrontendSettings,
}
READY: Final = {"executor": EXECUTOR_SERVICE, "frontend": PUBLIC_SERVICE}
Manifest = dict[str, Any]


class Rendered:
    """What one kustomization makes."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.all: list[Manifest] = list(yaml.safe_load_all(path.read_text()))

    def of(self, kind: str) -> dict[str, Manifest]:
        """By name."""
        return {m["metadata"]["name"]: m for m in self.all if m["kind"] == kind}

    def pod(self, service: str) -> Manifest:
        """The pod template of blockyard-`service`."""
        template: Manifest = self.of("StatefulSet")[f"blockyard-{service}"]["spec"]["template"]
        return template

    def containers(self) -> Iterator[tuple[str, Manifest]]:
        for service in ("scheduler", "executor"):
            for container in self.pod(service)["spec"]["containers"]:
                yield container["name"], container

    def settings(self, name: str) -> Any:
        """What a container's process reads from its flags and environment."""
        container = dict(self.containers())[name]
        words = [word.replace("$(POD_INDEX)", "0") for word in container["args"]]
        if words[0].startswith("scheduler_svc."):
            assert words.pop(0) == f"scheduler_svc.{name}"
        environment = {e["name"]: e["value"] for e in container.get("env", ()) if "value" in e}
        for source in container.get("envFrom", ()):
            environment |= self.of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        for variable in environment:
            service, field = re.fullmatch(r"BLOCKYARD_([A-Z]+)_(.+)", variable).groups()  # type: ignore[union-attr]  # fails
            assert field.lower() in SETTINGS[service.lower()].model_fields, variable
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            return SETTINGS[name].parse(words)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    kubectl = need(KUBECTL)
    made = {}
    for name, components in COMPONENTS.items():
        directory = tmp_path_factory.mktemp("kustomize")
        source = K8S / ("base" if name == "base" else f"overlays/{name}")
        if not source.exists():
            source = directory
            paths = {c: os.path.relpath(K8S / "components" / c, directory) for c in components}
            kustomization = {
                "resources": [os.path.relpath(K8S / "base", directory)],
                "components": list(paths.values()),
            }
            (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run([kubectl, "kustomize", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        path = directory / "rendered.yaml"
        path.write_text(done.stdout)
        made[name] = Rendered(name, path)
    return made


@pytest.fixture(params=COMPONENTS)
def rendered(request: pytest.FixtureRequest, every: dict[str, Rendered]) -> Rendered:
    return every[request.param]


def test_all_manifests_fit_their_schemas(every: dict[str, Rendered]) -> None:
    directory = need(KUBERNETES_VALIDATE).parent
    paths = [str(rendered.path) for rendered in every.values()]
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", *paths],
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    unknown = re.findall(r"schema for kind (\w+) with api version (\S+) ", said)
    custom = [m for rendered in every.values() for m in rendered.all]
    known = [m for m in custom if custom_resources.is_custom(m)]
    assert sorted(unknown) == sorted((m["kind"], m["apiVersion"]) for m in known)
    for manifest in known:
        custom_resources.check(manifest)
    assert {(m["apiVersion"], m["kind"]) for m in known} == set(custom_resources.MODELS)


def test_a_wrong_custom_resource_is_found(every: dict[str, Rendered]) -> None:
    spoils: list[tuple[str, Callable[[Any], object]]] = [
        ("GRPCRoute", lambda spec: spec["rules"][0]["matches"][0]["method"].update(servce="x")),
        ("GRPCRoute", lambda spec: spec["parentRefs"][0].update(port="50051")),
        ("DestinationRule", lambda spec: spec["trafficPolicy"]["outlierDetection"].update(a=1)),
        ("DestinationRule", lambda spec: spec["trafficPolicy"]["loadBalancer"].update(simple="X")),
    ]
    for kind, spoil in spoils:
        (manifest,) = copy.deepcopy(list(every["istio"].of(kind).values()))
        custom_resources.check(manifest)
        spoil(manifest["spec"])
        with pytest.raises(pydantic.ValidationError):
            custom_resources.check(manifest)


def test_processes_take_their_flags_and_environment(rendered: Rendered) -> None:
    executor, engine = rendered.settings("executor"), rendered.settings("engine")
    frontend = rendered.settings("frontend")
    assert frontend.engine == engine.listen
    assert engine.executor == "blockyard-executor-0.blockyard-executor:50053"
    assert executor.device == ("cuda" if "gpu" in rendered.name else "auto")
    in_mesh = bool({"istio", "linkerd"} & set(rendered.name.split()))
    assert engine.insecure_internal is executor.insecure_internal is in_mesh
    if not in_mesh:
        assert executor.internal_allow == ("blockyard-scheduler",)
        assert engine.executor_name == "blockyard-executor"
        for name in ("engine", "executor"):
            container = dict(rendered.containers())[name]
            mounts = {m["mountPath"] for m in container["volumeMounts"]}
            assert str(rendered.settings(name).internal_ca.parent) in mounts


def test_images_are_those_of_the_container_files(rendered: Rendered) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    executor = "blockyard-executor-gpu" if "gpu" in rendered.name else "blockyard-executor"
    images = {name: container["image"] for name, container in rendered.containers()}
    scheduler = f"blockyard-scheduler:{version}"
    assert images == {
        "executor": f"{executor}:{version}",
        "engine": scheduler,
        "frontend": scheduler,
    }


def test_ports_are_named_for_meshes(rendered: Rendered) -> None:
    protocol = "grpc" if "istio" in rendered.name else "kubernetes.io/h2c"
    for name, service in rendered.of("Service").items():
        (port,) = service["spec"]["ports"]
        assert (port["name"], port["appProtocol"]) == ("grpc", protocol), name
        which = service["spec"]["selector"]["app.kubernetes.io/name"].removeprefix("blockyard-")
        ports = {
            each["name"]: each["containerPort"]
            for container in rendered.pod(which)["spec"]["containers"]
            for each in container["ports"]
        }
        assert ports[port["targetPort"]] == port["port"]
    for name, container in rendered.containers():
        settings = rendered.settings(name)
        listened = [settings.listen, settings.admin, getattr(settings, "metrics_address", "")]
        assert {int(a.rpartition(":")[2]) for a in listened if a and "unix:" not in a} == {
            each["containerPort"] for each in container["ports"]
        }


def test_probes_ask_for_health_by_name(rendered: Rendered) -> None:
    for name, container in rendered.containers():
        admin_port = int(rendered.settings(name).admin.rpartition(":")[2])
        wanted = {"startupProbe": LIVENESS, "livenessProbe": LIVENESS}
        if name in READY:
            wanted["readinessProbe"] = READY[name]
        probes = {key: probe for key, probe in container.items() if key.endswith("Probe")}
        assert {key: probe["grpc"] for key, probe in probes.items()} == {
            key: {"port": admin_port, "service": service} for key, service in wanted.items()
        }


def test_everybody_has_time_to_drain(rendered: Rendered) -> None:
    scheduler, executor_pod = rendered.pod("scheduler"), rendered.pod("executor")
    frontend, engine = rendered.settings("frontend"), rendered.settings("engine")
    sleep_s = dict(rendered.containers())["frontend"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    frontend_s = sleep_s + frontend.lame_duck_s + frontend.drain_grace_s
    limit_s = scheduler["spec"]["terminationGracePeriodSeconds"]
    assert frontend_s < engine.drain_grace_s < limit_s
    executor_s = rendered.settings("executor").drain_grace_s
    assert engine.drain_grace_s < executor_s
    assert executor_s < executor_pod["spec"]["terminationGracePeriodSeconds"]
    probe = dict(rendered.containers())["frontend"]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < frontend.lame_duck_s
    annotations = scheduler["metadata"]["annotations"]
    if rendered.name == "linkerd":
        wait_s = int(annotations["config.alpha.linkerd.io/proxy-wait-before-exit-seconds"])
        assert frontend_s < wait_s < limit_s
    if "istio" in rendered.name:
        proxy = yaml.safe_load(annotations["proxy.istio.io/config"])
        assert proxy["holdApplicationUntilProxyStarts"]
        assert proxy["proxyMetadata"]["EXIT_ON_ZERO_ACTIVE_CONNECTIONS"] == "true"


def test_pods_are_confined_and_spread(rendered: Rendered) -> None:
    for service in ("scheduler", "executor"):
        pod = rendered.pod(service)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        account = rendered.of("ServiceAccount")[pod["spec"]["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is False
        keys = [c["topologyKey"] for c in pod["spec"]["topologySpreadConstraints"]]
        assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        for constraint in pod["spec"]["topologySpreadConstraints"]:
            assert_selects(constraint["labelSelector"], pod)
    for name, container in rendered.containers():
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["readOnlyRootFilesystem"], name
        assert not context["allowPrivilegeEscalation"], name
        assert container["resources"]["limits"]["memory"], name


def assert_selects(selector: Manifest, pod: Manifest) -> None:
    labels = pod["metadata"]["labels"]
    assert selector["matchLabels"].items() <= labels.items()


def test_disruptions_and_autoscaling_reach_both_halves(rendered: Rendered) -> None:
    rules = load(K8S / "external-metrics.yaml")["rules"]["external"]
    served = {rule["name"]["as"] for rule in rules}
    scalers = rendered.of("HorizontalPodAutoscaler")
    for service in ("scheduler", "executor"):
        name = f"blockyard-{service}"
        budget = rendered.of("PodDisruptionBudget")[name]["spec"]
        assert budget["maxUnavailable"] == 1
        assert_selects(budget["selector"], rendered.pod(service))
        target = scalers[name]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("StatefulSet", name)
    first, second = (copy.deepcopy(each["spec"]) for each in scalers.values())
    for spec in (first, second):
        del spec["scaleTargetRef"]
    assert first == second  # or the pairs come apart
    names = [metric["external"]["metric"]["name"] for metric in first["metrics"]]
    assert names[0] == "vllm_num_requests_waiting"
    assert set(names) == served


def test_only_schedulers_reach_executors(rendered: Rendered) -> None:
    policy = rendered.of("NetworkPolicy")["blockyard-executor"]["spec"]
    assert_selects(policy["podSelector"], rendered.pod("executor"))
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    assert set(peer) == {"podSelector"}
    assert_selects(peer["podSelector"], rendered.pod("scheduler"))
    proxy = [4143] if rendered.name == "linkerd" else []
    assert [port["port"] for port in rule["ports"]] == ["grpc", *proxy]
    account = rendered.pod("scheduler")["spec"]["serviceAccountName"]
    if "istio" in rendered.name:
        authorization = rendered.of("AuthorizationPolicy")["blockyard-executor"]["spec"]
        assert_selects(authorization["selector"], rendered.pod("executor"))
        (allowed,) = authorization["rules"]
        assert allowed["from"][0]["source"]["principals"] == [f"*/ns/blockyard/sa/{account}"]
        assert allowed["to"][0]["operation"]["ports"] == ["50053"]
    if rendered.name == "linkerd":
        (server,) = rendered.of("Server").values()
        assert server["spec"]["port"] == 50053
        assert_selects(server["spec"]["podSelector"], rendered.pod("executor"))
        (identity,) = rendered.of("MeshTLSAuthentication").values()
        assert identity["spec"]["identityRefs"][0]["name"] == account


def test_routes_lead_to_the_public_api(rendered: Rendered) -> None:
    for route in rendered.of("GRPCRoute").values():
        services = rendered.of("Service")
        (rule,) = route["spec"]["rules"]
        for ref in (*route["spec"]["parentRefs"], *rule["backendRefs"]):
            assert services[ref["name"]]["spec"]["ports"][0]["port"] == ref["port"]
        matched = {match["method"]["service"] for match in rule["matches"]}
        assert PUBLIC_SERVICE in matched
        assert route["metadata"]["name"] in services
    for rule in rendered.of("DestinationRule").values():
        assert rule["spec"]["host"] in rendered.of("Service")
        assert rule["spec"]["trafficPolicy"]["loadBalancer"]["simple"] == "LEAST_REQUEST"

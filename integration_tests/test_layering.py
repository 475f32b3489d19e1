"""The import layering of docs/design.md, read from the sources."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DEVICE_LIBRARIES = {"torch", "transformers", "cupy", "numba", "safetensors", "gguf"}
SHARED = ("blockyard.common", "blockyard.v1", "blockyard.engine.v1", "blockyard.executor.v1")


def sources(package: str) -> list[pathlib.Path]:
    found = [
        path
        for path in (ROOT / package).rglob("*.py")
        if "tests" not in path.parts and "_pb2" not in path.name
    ]
    assert found, package
    return found


def imports(path: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden(package: str, roots: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in roots
    ]


def test_scheduler_needs_no_device_library() -> None:
    assert not forbidden("scheduler_svc", {*DEVICE_LIBRARIES, "executor_svc", "cupy_kernels"})


def test_executor_does_not_know_the_scheduler() -> None:
    assert not forbidden("executor_svc", {"scheduler_svc"})


@pytest.mark.parametrize("package", ["scheduler_svc", "executor_svc"])
def test_services_share_only_stubs_and_common(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(package)
        for name in imports(path)
        if name.startswith("blockyard.") and not name.startswith(SHARED)
    ]
    wrong = [w for w in wrong if not w.endswith((": blockyard.engine", ": blockyard.executor"))]
    assert not wrong


def test_common_depends_on_neither_service_nor_device() -> None:
    roots = {*DEVICE_LIBRARIES, "scheduler_svc", "executor_svc"}
    assert not forbidden("blockyard/common", roots)


@pytest.mark.parametrize(
    "folder", ["blockyard/client", "blockyard/cli", "blockyard/launcher", "blockyard/bench"]
)
def test_what_users_touch_starts_services_but_does_not_import_them(folder: str) -> None:
    assert not forbidden(folder, {"torch", "transformers", "scheduler_svc", "executor_svc"})


STEP_PATH = (
    "plan.py",
    "plan_check.py",
    "row_state.py",
    "step_worker.py",
    "service.py",
    "backends/checking/digests.py",
    "backends/checking/runner.py",
)


@pytest.mark.parametrize("name", STEP_PATH)
def test_the_step_path_runs_without_torch(name: str) -> None:
    assert not {n.split(".")[0] for n in imports(ROOT / "executor_svc" / name)} & DEVICE_LIBRARIES


def test_only_these_files_know_block_ids() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for path in sources("scheduler_svc")
        if "block_ids" in path.read_text() or "BlockIds" in path.read_text()
    }
    assert knowing <= {
        "scheduler_svc/batch.py",
        "scheduler_svc/block_pool.py",
        "scheduler_svc/kv_manager.py",
        "scheduler_svc/plan_codec.py",
        "scheduler_svc/planner.py",
        "scheduler_svc/request.py",
        "scheduler_svc/scheduler.py",
        "scheduler_svc/step_plan.py",
    }


def test_settings_are_read_in_config_modules_only() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in ("scheduler_svc", "executor_svc", "blockyard")
        for path in sources(package)
        if re.search(r"environ\.(get|pop)|environ\[[^]]+\](?! *=)|getenv", path.read_text())
    }
    # The second is told by its launcher who started it, which is no setting.
    assert readers <= {"blockyard/models/store.py", "blockyard/common/process.py"}, readers

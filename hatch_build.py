"""Build hook: generates the protobuf and gRPC stubs from protos/ into the blockyard package."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside a build
    BuildHookInterface = object  # type: ignore[assignment, misc]

ROOT = pathlib.Path(__file__).parent


def generate() -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py(i) beside each proto's package."""
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")),
        *(f"--{kind}_out={ROOT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(str(path) for path in protos),
    ]
    # protoc finds its plugins (mypy-protobuf) on PATH, and a build environment's bin is not there.
    bin_dir = pathlib.Path(sys.executable).parent
    for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        if (bin_dir / plugin).exists():
            command.insert(3, f"--plugin={plugin}={bin_dir / plugin}")
    subprocess.run(command, check=True)
    for proto in protos:
        directory = ROOT / proto.relative_to(ROOT / "protos").parent
        while directory not in (ROOT, ROOT / "blockyard"):
            init = directory / "__init__.py"
            if not init.exists():
                init.write_text('"""Generated from protos/ at build time."""\n')
            directory = directory.parent


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `generate` before a wheel or an editable install is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; `version` is "standard" or "editable"."""
        generate()


if __name__ == "__main__":
    generate()

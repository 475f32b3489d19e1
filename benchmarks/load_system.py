"""A front end, an engine and a simulated executor as processes, for benchmarks of the load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench_streams import write_model_dir
from benchmarks.engine_driver import engine_driver
from benchmarks.processes import Processes, cpu_ns, processes, resident_mib

VOCAB_SIZE: Final = 1000
_COUNT_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class LoadSystem:
    """The processes, and what they take."""

    children: Processes
    address: str
    frontend_pid: int
    engine_pid: int

    @property
    def frontend_cpu_s(self) -> float:
        """CPU time of the front end so far [s]."""
        return cpu_ns(self.frontend_pid) / 1e9

    def memory_mib(self) -> dict[str, float]:
        """Resident memory of front end and engine [MiB]."""
        return {
            "frontend": resident_mib(self.frontend_pid),
            "engine": resident_mib(self.engine_pid),
        }

    async def num_objects(self) -> dict[str, int]:
        """Python objects that front end and engine hold, after a collection; see object_counts."""
        pids = {"frontend": self.frontend_pid, "engine": self.engine_pid}
        counts = {}
        for name, pid in pids.items():
            path = self.children.run_dir / f"{name}.objects"
            num_lines = _num_lines(path)
            os.kill(pid, signal.SIGUSR1)
            async with asyncio.timeout(_COUNT_TIMEOUT_S):
                while _num_lines(path) == num_lines:  # noqa: ASYNC110 - another process writes
                    await asyncio.sleep(0.05)
            last: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            counts[name] = int(last["num_objects"])
        return counts


def _num_lines(path: pathlib.Path) -> int:
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


@contextlib.asynccontextmanager
async def load_system(
    *,
    num_rows: int,
    step_ms: float,
    executor_flags: Sequence[str] = (),
    engine_flags: Sequence[str] = (),
    frontend_flags: Sequence[str] = (),
    counts_objects: bool = False,
) -> AsyncIterator[LoadSystem]:
    """Start everything; ready when entered. Raises ProcessError."""
    async with processes() as children:
        executor, engine = children.socket("executor"), children.socket("engine")
        flags = ["--listen", executor, "--vocab-size", str(VOCAB_SIZE), "--max-model-len", "4096"]
        flags += ["--num-device-blocks", "131072", "--max-num-batched-tokens", "32768"]
        flags += ["--max-rows", str(num_rows), "--step-ms", str(step_ms), *executor_flags]
        await children.start("executor", "integration_tests.fake_executor", flags, executor)
        pids = {}
        model_path = children.run_dir / "model"
        write_model_dir(model_path)
        address = children.socket("frontend")
        commands = {
            "engine": ["--listen", engine, "--executor", executor, "--strict", *engine_flags],
            "frontend": [
                *("--engine", engine, "--listen", address, "--model-dir", str(model_path)),
                *frontend_flags,
            ],
        }
        for name, flags in commands.items():
            module = f"scheduler_svc.{name}"
            if counts_objects:
                flags = [str(children.run_dir / f"{name}.objects"), module, *flags]
                module = "benchmarks.object_counts"
            where = engine if name == "engine" else address
            pids[name] = await children.start(name, module, flags, where)
        async with engine_driver(engine):
            pass  # ready
        yield LoadSystem(children, address, pids["frontend"], pids["engine"])
        for name in ("frontend", "engine", "executor"):
            await children.stop(name)

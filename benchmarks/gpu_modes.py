"""The same greedy requests served in several ways, each with proof that it was that way."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks import plan_evidence
from benchmarks.correctness import BLOCK_SIZE, NUM_OUTPUT_TOKENS, complete, small_pool_size
from benchmarks.plan_evidence import Evidence
from benchmarks.prompts import Prompt
from benchmarks.report import Target
from blockyard.client import AsyncClient, Completion
from blockyard.common import model_dir
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer

Device = Literal["cpu", "cuda"]
KV_MEMORY: Final = "2GiB"
NUM_KILLS: Final = 2
_ELEMENT_BYTES: Final = {"cpu": 4, "cuda": 2}
_MAX_ROWS: Final = {"cpu": 64, "cuda": 128}
_KILLED_ROWS: Final = 16
"""Few, so that the requests still run when their client has seen enough for the next kill."""
_MOST_BETWEEN_KILLS: Final = 0.3
"""Of all output tokens."""
_NUM_LAST_LINES: Final = 20


@dataclass(frozen=True, slots=True)
class Served:
    """What came of one mode."""

    answers: list[Completion]
    evidence: Evidence
    num_preemptions: int
    num_kills: int
    num_restarts: int  # of the executor


@dataclass(frozen=True, slots=True)
class Proof:
    """What must be true if the mode did what it is for: a count of Served or its Evidence."""

    count: str
    comparison: Literal["<=", ">="]
    limit: int

    def target(self, mode: str, served: Served) -> Target:
        """The count beside its limit."""
        source = served if hasattr(served, self.count) else served.evidence
        value = getattr(source, self.count)
        what = self.count.removeprefix("num_").replace("_", " ")
        return Target(f"{mode}: {what}", value, self.comparison, self.limit)


@dataclass(frozen=True, slots=True)
class GpuMode:
    """One way of serving."""

    name: str
    settings: ServeSettings
    proofs: tuple[Proof, ...]
    is_sequential: bool = False
    num_kills: int = 0


def gpu_modes(
    model: model_dir.ModelDir, device: Device, prompt_lengths: Sequence[int]
) -> list[GpuMode]:
    """All modes for prompts of so many tokens."""
    common: dict[str, Any] = {"model": str(model.path), "listen": "127.0.0.1:0"}
    common |= {"device": device, "block_size": BLOCK_SIZE, "kv_memory": KV_MEMORY}
    common |= {"max_num_seqs": _MAX_ROWS[device]}

    def settings(**options: Any) -> ServeSettings:
        return ServeSettings(**(common | options))

    lengths = [length + NUM_OUTPUT_TOKENS for length in prompt_lengths]
    small = small_pool_size(model, lengths, _ELEMENT_BYTES[device])
    half = min(_MAX_ROWS[device], len(lengths)) // 2
    swapping = {"host_memory": "1GiB", "preemption": "swap"}
    return [
        GpuMode("one at a time", settings(), (Proof("max_rows", "<=", 1),), is_sequential=True),
        GpuMode(
            "all together",
            settings(),
            (Proof("max_rows", ">=", half), Proof("max_plans_in_flight", ">=", 2)),
        ),
        GpuMode(
            "budget of 64 tokens",
            settings(max_num_batched_tokens=64, max_num_seqs=64),
            (Proof("max_tokens", "<=", 64), Proof("max_rows", ">=", 2)),
        ),
        GpuMode(
            "window 1",
            settings(window=1),
            (Proof("max_plans_in_flight", "<=", 1), Proof("max_rows", ">=", half)),
        ),
        GpuMode(
            "small pool",
            settings(kv_memory=small, preemption="recompute"),
            (Proof("num_preemptions", ">=", 1), Proof("num_swapped_out", "<=", 0)),
        ),
        GpuMode(
            "small pool, swapped",
            settings(kv_memory=small, **swapping),
            (Proof("num_swapped_out", ">=", 1), Proof("num_swapped_in", ">=", 1)),
        ),
        GpuMode(
            "killed",
            settings(max_num_seqs=_KILLED_ROWS),
            (
                Proof("num_kills", ">=", NUM_KILLS),
                Proof("num_restarts", ">=", NUM_KILLS),
                Proof("num_epochs", ">=", 1 + NUM_KILLS),
            ),
            num_kills=NUM_KILLS,
        ),
    ]


@dataclass(slots=True)
class Killer:
    """Ends the executor each time that clients have seen a random number of tokens more."""

    server: LocalServer
    moments: collections.deque[int]  # tokens to see from the start, or from the last kill
    killed: list[int] = field(default_factory=list)  # process ids
    pids: set[int] = field(default_factory=set)
    num_seen: int = 0

    @classmethod
    def random(cls, server: LocalServer, num_kills: int, num_tokens: int) -> Killer:
        """To kill so many times while so many tokens come out."""
        most = max(1, int(_MOST_BETWEEN_KILLS * num_tokens))
        return cls(server, collections.deque(random.randint(1, most) for _ in range(num_kills)))

    def on_tokens(self, count: int) -> None:
        """Some stream got so many."""
        self.num_seen += count
        pid = self.note_pid()
        is_due = bool(self.moments) and self.num_seen >= self.moments[0]
        if is_due and pid is not None and pid not in self.killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
                self.moments.popleft()
                self.num_seen = 0

    def note_pid(self) -> int | None:
        """Remember and return the executor's, if there is one."""
        pid = self.server.pids.get("executor")
        if pid is not None:
            self.pids.add(pid)
        return pid


async def serve(mode: GpuMode, prompts: Sequence[Prompt]) -> Served:
    """Serve all prompts in one mode.

    Raises ServeError, also with the server's last lines if a request failed, and PlanLogError.
    """
    lines: collections.deque[str] = collections.deque(maxlen=_NUM_LAST_LINES)
    with tempfile.TemporaryDirectory(prefix="blockyard-mode-") as folder:
        log = Path(folder) / "plans"
        settings = mode.settings.model_copy(update={"plan_log": log})
        server = LocalServer(settings, lambda name, line: lines.append(f"{name}: {line}"))
        try:
            async with server, AsyncClient(server.address) as client:
                killer = Killer.random(server, mode.num_kills, len(prompts) * NUM_OUTPUT_TOKENS)
                answers = await _answers(mode, client, prompts, killer)
                killer.note_pid()
        except Exception as error:
            said = "".join(f"\n  {line}" for line in lines)
            raise ServeError(f"{type(error).__name__}: {error}; last lines:{said}", 1) from error
        evidence = plan_evidence.read(log)
    num_preemptions = sum(answer.usage.preemptions for answer in answers)
    num_restarts = len(killer.pids) - 1
    return Served(answers, evidence, num_preemptions, len(killer.killed), num_restarts)


async def _answers(
    mode: GpuMode, client: AsyncClient, prompts: Sequence[Prompt], killer: Killer
) -> list[Completion]:
    works = [
        complete(client, prompt, NUM_OUTPUT_TOKENS, on_tokens=killer.on_tokens)
        for prompt in prompts
    ]
    if mode.is_sequential:
        return [await work for work in works]
    return await asyncio.gather(*works)

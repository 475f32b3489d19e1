"""Ours and transformers in turn on the same requests, one of them idle while the other runs."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, TypeVar

from benchmarks.client_load import StreamTimes, decode_step_s, duration_s, run_all
from benchmarks.hf_peer import HfPeer
from benchmarks.processes import all_cpu_seconds, cpu_seconds
from benchmarks.report import percentiles
from benchmarks.workloads import Work
from blockyard.launcher.server import LocalServer

_T = TypeVar("_T")

BATCH_SIZES: Final = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one side."""

    tokens_per_s: float  # of the output tokens that were asked for
    seconds: float
    idle_cores: float  # CPU that the other side used meanwhile
    foreign_cores: float  # CPU that other programs used meanwhile, or the host took
    batch_size: int | None = None  # transformers' only
    step_s: float | None = None  # ours: a step while all requests decode
    first_token_s: dict[str, float] | None = None  # ours


@dataclass(frozen=True, slots=True)
class Pair:
    """Neighbouring runs of the two sides."""

    ours: Run
    theirs: Run  # at the batch size that was best for them

    @property
    def ratio(self) -> float:
        """Our throughput over theirs."""
        return self.ours.tokens_per_s / self.theirs.tokens_per_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload."""

    name: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    pairs: list[Pair]
    all_theirs: list[Run]  # every batch size that was tried

    @property
    def ratio(self) -> float:
        """Median of the pairs'."""
        return median(pair.ratio for pair in self.pairs)

    @property
    def all_runs(self) -> list[Run]:
        """Of both sides."""
        return [*(pair.ours for pair in self.pairs), *self.all_theirs]


class Contest:
    """A running server and a loaded peer."""

    def __init__(self, server: LocalServer, peer: HfPeer) -> None:
        self._server = server
        self._peer = peer

    async def compare(
        self, name: str, works: Sequence[Work], batch_sizes: Sequence[int], num_pairs: int
    ) -> Comparison:
        """Alternate the two sides `num_pairs` times.

        Transformers runs every batch size in the first pair, the best one of these in the others.
        """
        pairs: list[Pair] = []
        all_theirs: list[Run] = []
        for number in range(1, num_pairs + 1):
            ours = await self._run_ours(works)
            print(f"{name}, pair {number}: ours {ours.tokens_per_s:.1f} tok/s", flush=True)
            theirs = []
            for batch_size in batch_sizes:
                theirs.append(await self._run_theirs(works, batch_size))
                speed = theirs[-1].tokens_per_s
                print(f"{name}, pair {number}: batch {batch_size} {speed:.1f} tok/s", flush=True)
            best = max(theirs, key=lambda run: run.tokens_per_s)
            assert best.batch_size is not None
            batch_sizes = [best.batch_size]
            all_theirs += theirs
            pairs.append(Pair(ours, best))
        return Comparison(
            name=name,
            num_requests=len(works),
            num_prompt_tokens=sum(len(work.token_ids) for work in works),
            num_output_tokens=sum(work.num_output_tokens for work in works),
            pairs=pairs,
            all_theirs=all_theirs,
        )

    async def warm_up(self, works: Sequence[Work]) -> None:
        """Let both sides allocate what they need."""
        await self._run_ours(works)
        await self._run_theirs(works, len(works))

    async def _run_ours(self, works: Sequence[Work]) -> Run:
        async def run() -> list[StreamTimes]:
            return await run_all(self._server.address, works)

        streams, idle_cores, foreign_cores = await self._watching([self._peer.pid], run)
        seconds = duration_s(streams)
        return Run(
            tokens_per_s=sum(work.num_output_tokens for work in works) / seconds,
            seconds=seconds,
            idle_cores=idle_cores,
            foreign_cores=foreign_cores,
            step_s=decode_step_s(streams),
            first_token_s=percentiles([stream.first_token_s for stream in streams]),
        )

    async def _run_theirs(self, works: Sequence[Work], batch_size: int) -> Run:
        """Static batches in order; each runs to its longest output."""

        async def run() -> float:
            seconds = 0.0
            for start in range(0, len(works), batch_size):
                batch = works[start : start + batch_size]
                longest = max(work.num_output_tokens for work in batch)
                seconds += await self._peer.generate([w.token_ids for w in batch], longest)
            return seconds

        pids = list(self._server.pids.values())
        seconds, idle_cores, foreign_cores = await self._watching(pids, run)
        num_tokens = sum(work.num_output_tokens for work in works)
        return Run(num_tokens / seconds, seconds, idle_cores, foreign_cores, batch_size)

    async def _watching(
        self, idle_pids: Sequence[int], run: Callable[[], Awaitable[_T]]
    ) -> tuple[_T, float, float]:
        """Result of `run`, and the CPU that the idle side and other programs used [cores]."""
        our_pids = [os.getpid(), self._peer.pid, *self._server.pids.values()]

        def used_s() -> tuple[float, float]:
            ours_s = sum(map(cpu_seconds, our_pids))
            return sum(map(cpu_seconds, idle_pids)), all_cpu_seconds() - ours_s

        start_s, (idle_s, foreign_s) = time.monotonic(), used_s()
        result = await run()
        seconds, (idle_end_s, foreign_end_s) = time.monotonic() - start_s, used_s()
        return result, (idle_end_s - idle_s) / seconds, (foreign_end_s - foreign_s) / seconds

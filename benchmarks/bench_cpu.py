"""The whole system on a CPU beside transformers' `generate`: `python -m benchmarks.bench_cpu`.

Ours is measured through the gRPC streaming client against the processes of `blockyard serve`.
Transformers runs in a process of its own, on the same float32 weights, with the same number of
threads, in static batches padded on the left, at the best of three batch sizes. The sides take
turns; the one that waits uses no CPU, which is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import uvloop

from benchmarks import report
from benchmarks.client_load import (
    StreamTimes,
    decode_step_s,
    largest_gap_s,
    median_gap_s,
    run_request,
)
from benchmarks.cpu_pairs import BATCH_SIZES, Comparison, Contest
from benchmarks.hf_peer import PeerError, hf_peer
from benchmarks.processes import ProcessError
from benchmarks.report import Target
from benchmarks.workloads import Work, conversation, equal
from blockyard.client import AsyncClient, BlockyardError
from blockyard.common import model_dir
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.errors import ModelImportError

NUM_THREADS: Final = 2
_NUM_DECODING: Final = 8
_ARRIVING_PROMPT_TOKENS: Final = 1500
_TOKENS_BEFORE_ARRIVAL: Final = 40
_NAMES: Final = ("single", "equal", "conversation")
_MAX_IDLE_CORES: Final = 0.03
_MAX_FOREIGN_CORES: Final = 0.2
"""More, and the figures say little: two spinning threads suffer most from a third."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, how transformers batches them, how often, and how much faster we must be."""

    name: str
    works: list[Work]
    batch_sizes: Sequence[int]
    num_pairs: int
    min_ratio: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """Streams that decode while a long prompt arrives. Gaps between messages [s]."""

    usual_gap_s: float
    largest_gap_s: float
    first_token_s: float  # of the long prompt
    decode_step_s: float  # before it came

    @property
    def added_gap_s(self) -> float:
        """What the long prompt added to the longest wait of any other stream."""
        return max(0.0, self.largest_gap_s - self.usual_gap_s)


def workloads(vocab_size: int, num_pairs: int, *, is_quick: bool) -> list[Workload]:
    """Ragged traffic, equal requests, a single stream."""

    def equals(count: int, prompt: int, output: int) -> list[Work]:
        return equal(count, vocab_size, num_prompt_tokens=prompt, num_output_tokens=output)

    if is_quick:
        ragged = conversation(16, vocab_size, prompt_divisor=16, output_divisor=8)
        return [
            Workload("conversation", ragged, (8,), 1, 2.5),
            Workload("equal", equals(32, 32, 32), (16,), 1, 2.0),
            Workload("single", equals(1, 128, 64), (1,), 1, 1.4),
        ]
    ragged = conversation(64, vocab_size, prompt_divisor=8, output_divisor=2)
    return [
        Workload("single", equals(1, 128, 64), (1,), 3, 1.4),
        Workload("equal", equals(64, 128, 128), BATCH_SIZES, num_pairs, 2.0),
        Workload("conversation", ragged, BATCH_SIZES, num_pairs, 2.5),
    ]


async def measure_arrival(address: str, vocab_size: int) -> Arrival:
    """Eight streams decode; a prompt of 1,500 tokens arrives."""
    decoding = equal(_NUM_DECODING, vocab_size, num_prompt_tokens=64, num_output_tokens=400)
    long_prompt = equal(
        1, vocab_size, num_prompt_tokens=_ARRIVING_PROMPT_TOKENS, num_output_tokens=8
    )[0]
    async with AsyncClient(address) as client:
        streams = [StreamTimes(time.monotonic(), work.num_output_tokens) for work in decoding]
        tasks = [
            asyncio.create_task(run_request(client, work, times))
            for work, times in zip(decoding, streams, strict=True)
        ]
        while min(stream.num_received for stream in streams) < _TOKENS_BEFORE_ARRIVAL:
            done, _ = await asyncio.wait(tasks, timeout=0.02, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # raises: none ends this early
        start_s = time.monotonic()
        step_s = decode_step_s(streams)
        usual_gap_s = median_gap_s(streams)
        late = await run_request(client, long_prompt)
        end_s = time.monotonic()
        assert not any(task.done() for task in tasks), "the streams were too short"
        gap_s = max(largest_gap_s(stream, start_s, end_s) for stream in streams)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Arrival(usual_gap_s, gap_s, late.first_token_s, step_s)


@dataclass(frozen=True, slots=True)
class Results:
    """What one run of the benchmark found."""

    comparisons: dict[str, Comparison]
    arrival: Arrival
    gemm_bounds: list[dict[str, float]]  # rows, plain_ms, packed_ms: a step's GEMMs alone
    peer: dict[str, Any]
    ready_s: float  # of the server, from its start

    def step_times_s(self) -> dict[int, float]:
        """Our decode step by rows, where it was seen."""
        steps = {_NUM_DECODING: self.arrival.decode_step_s}
        for name in ("single", "equal"):
            if (comparison := self.comparisons.get(name)) is None:
                continue
            times = [pair.ours.step_s for pair in comparison.pairs if pair.ours.step_s]
            steps[comparison.num_requests] = median(times)
        return steps


async def gemm_bounds(model_path: Path) -> list[dict[str, float]]:
    """What the matrix products alone of a decode step take, by rows. Raises ProcessError."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.gemm_bound", str(model_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise ProcessError(f"benchmarks.gemm_bound ended with {process.returncode}")
    bounds: list[dict[str, float]] = json.loads(output)
    return bounds


async def measure(model_path: Path, loads: Sequence[Workload]) -> Results:
    """Everything, on one server and one peer."""
    model = model_dir.load(model_path)
    settings = ServeSettings(
        model=str(model_path), listen="127.0.0.1:0", num_threads=NUM_THREADS, log_level="WARNING"
    )
    bounds = await gemm_bounds(model_path)
    async with hf_peer(model_path, NUM_THREADS) as peer, LocalServer(settings) as server:
        contest = Contest(server, peer)
        await contest.warm_up(equal(2, model.vocab_size, num_prompt_tokens=16, num_output_tokens=8))
        arrival = await measure_arrival(server.address, model.vocab_size)
        comparisons = {}
        for load in loads:
            comparisons[load.name] = await contest.compare(
                load.name, load.works, load.batch_sizes, load.num_pairs
            )
        return Results(comparisons, arrival, bounds, await peer.describe(), server.ready_s)


def print_results(results: Results) -> None:
    """The tables."""
    rows = []
    for name, c in results.comparisons.items():
        first = c.pairs[0].ours.first_token_s or {}
        rows.append(
            (
                f"{name}: {c.num_requests} x ({c.num_prompt_tokens / c.num_requests:.0f} + "
                f"{c.num_output_tokens / c.num_requests:.0f})",
                median(pair.ours.tokens_per_s for pair in c.pairs),
                median(pair.theirs.tokens_per_s for pair in c.pairs),
                c.pairs[0].theirs.batch_size or 0,
                c.ratio,
                f"{first.get('p50', 0):.2f} / {first.get('p99', 0):.2f}",
            )
        )
    headers = ("requests", "ours tok/s", "transformers tok/s", "its batch", "ratio")
    report.print_table("Output tokens", (*headers, "our first token p50 / p99 s"), rows)
    print_steps(results)
    arrival = results.arrival
    print(
        f"\nA prompt of {_ARRIVING_PROMPT_TOKENS} tokens arrives while {_NUM_DECODING} streams "
        f"decode: usual gap {arrival.usual_gap_s:.3f} s, largest {arrival.largest_gap_s:.3f} s, "
        f"its own first token after {arrival.first_token_s:.2f} s"
    )


def step_shares(results: Results) -> dict[int, tuple[float, float]]:
    """Time of a decode step's matrix products alone, plain and packed, by the clients' step time.

    By number of rows, where both were measured.
    """
    steps_s = results.step_times_s()
    return {
        int(bound["rows"]): (
            bound["plain_ms"] / (1e3 * steps_s[int(bound["rows"])]),
            bound["packed_ms"] / (1e3 * steps_s[int(bound["rows"])]),
        )
        for bound in results.gemm_bounds
        if int(bound["rows"]) in steps_s
    }


def print_steps(results: Results) -> None:
    """Our decode steps beside the matrix products alone, where both were measured."""
    shares, steps_s = step_shares(results), results.step_times_s()
    rows = []
    for bound in results.gemm_bounds:
        num_rows = int(bound["rows"])
        if num_rows in shares:
            plain, packed = shares[num_rows]
            step_ms = 1e3 * steps_s[num_rows]
            rows.append((num_rows, step_ms, bound["plain_ms"], plain, bound["packed_ms"], packed))
    headers = ("rows", "step ms", "torch GEMMs alone ms", "share", "packed GEMMs alone ms", "share")
    report.print_table("Decode steps, seen by the clients", headers, rows)


def targets(results: Results, loads: Sequence[Workload]) -> list[Target]:
    """Faster than transformers, near the bound of a step, no stalls, an honest comparison."""
    runs = [run for c in results.comparisons.values() for run in c.all_runs]
    idle, foreign = (max(getattr(r, f"{who}_cores") for r in runs) for who in ("idle", "foreign"))
    return [
        *(
            Target(
                f"{load.name}, ours / transformers",
                results.comparisons[load.name].ratio,
                ">=",
                load.min_ratio,
                "x",
            )
            for load in loads
        ),
        *(
            Target(f"plain torch GEMMs / decode step, {num_rows} rows", plain, ">=", 0.85)
            for num_rows, (plain, _) in step_shares(results).items()
        ),
        Target("gap that a long prompt adds", results.arrival.added_gap_s, "<=", 0.5, "s"),
        Target("CPU used by the side that waits", idle, "<=", _MAX_IDLE_CORES, "cores"),
        Target("CPU used by other programs", foreign, "<=", _MAX_FOREIGN_CORES, "cores"),
    ]


def main() -> int:
    """Measure, print, write results/cpu.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=__doc__)
    parser.add_argument("--model", default=store.DEFAULT_MODEL)
    parser.add_argument("--pairs", type=int, default=1, help="of the two long workloads")
    parser.add_argument("--quick", action="store_true", help="small loads; nothing is written")
    parser.add_argument("--only", choices=_NAMES, help="one workload, into cpu_NAME.json")
    flags = parser.parse_args()
    try:
        model_path = store.resolve(flags.model)
        vocab_size = model_dir.load(model_path).vocab_size
        loads = workloads(vocab_size, flags.pairs, is_quick=flags.quick)
        loads = [load for load in loads if flags.only in (None, load.name)]
        results = uvloop.run(measure(model_path, loads))
    except (ModelImportError, ServeError, PeerError, ProcessError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    print_results(results)
    reached = targets(results, loads)
    are_met = report.print_targets(reached)
    if not flags.quick:
        document = asdict(results) | {"model": model_path.name, "num_threads": NUM_THREADS}
        document["decode_step_s"] = results.step_times_s()
        report.write(f"cpu_{flags.only}" if flags.only else "cpu", document, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

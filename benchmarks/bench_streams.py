"""Streams through the real front end and engine: `python -m benchmarks.bench_streams`.

The executor is simulated: 30 ms a step, and tokens that depend on the content of every KV block,
so that each stream can be compared with a reference that knows no blocks. Three phases in one run:

    idle        256 requests straight over the engine's link; the front end has nothing to do
    streams     256 client streams
    saturated   256 client streams, and as many short calls as the front end answers

Cores are shared out: engine and executor on one half, front end and clients on the other, so that
what reaches the engine reaches it through its link, and not because the machine is too small.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import report
from benchmarks.engine_driver import engine_driver
from benchmarks.processes import ProcessError, Processes, cpu_seconds, pin, processes
from benchmarks.report import Target, percentiles
from benchmarks.workloads import Work, equal
from blockyard.client import AsyncClient, BlockyardError
from blockyard.common import model_dir
from integration_tests.reference import reference_output

STEP_MS: Final = 30.0
NUM_STREAMS: Final = 256
NUM_PROMPT_TOKENS: Final = 64
_VOCAB_SIZE: Final = 1000
_DIGEST: Final = "fake"
"""The simulated executor's."""
_BURST_NS: Final = 1_000_000_000
_FLOOD_WARM_UP_S: Final = 2.0
_PHASES: Final = ("idle", "streams", "saturated")


@dataclass(slots=True)
class Stream:
    """What one client saw."""

    token_ids: list[int]
    num_messages: int
    arrivals_s: list[float]  # of messages


@dataclass(frozen=True, slots=True)
class Phase:
    """When a phase ran (monotonic), what it used, and what its clients saw."""

    name: str
    start_ns: int
    end_ns: int
    frontend_cores: float  # CPU time over wall time
    front_load: float  # of the half that front end and clients share: 1 is all of it
    streams: list[Stream]


@dataclass(frozen=True, slots=True)
class System:
    """The processes under test."""

    children: Processes
    address: str
    frontend_pid: int
    num_front_cpus: int


def write_model_dir(path: pathlib.Path) -> None:
    """A directory without weights that a front end can serve the simulated model from."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(report.ROOT / "docs" / "design.md")], trainer)
    assert tokenizer.get_vocab_size() == _VOCAB_SIZE, "too little text to train on"
    path.mkdir()
    tokenizer.save(str(path / model_dir.TOKENIZER_FILE))
    files = {
        model_dir.CONFIG_FILE: {"vocab_size": _VOCAB_SIZE, "max_position_embeddings": 4096},
        model_dir.MANIFEST_FILE: {
            "format_version": model_dir.FORMAT_VERSION,
            "name": "simulated",
            "digest": _DIGEST,
            "source": "benchmark",
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")


@asynccontextmanager
async def running_system() -> AsyncIterator[System]:
    """Executor, measured engine and front end, on their halves of the cores."""
    cpus = sorted(os.sched_getaffinity(0))
    back, front = set(cpus[: len(cpus) // 2]), set(cpus[len(cpus) // 2 :])
    async with processes() as children:
        executor, engine = children.socket("executor"), children.socket("engine")
        model_path = children.run_dir / "model"
        write_model_dir(model_path)
        flags = ["--listen", executor, "--vocab-size", str(_VOCAB_SIZE), "--max-model-len", "4096"]
        flags += ["--num-device-blocks", "32768", "--max-num-batched-tokens", "32768"]
        flags += ["--max-rows", str(NUM_STREAMS), "--step-ms", str(STEP_MS)]
        pids = [
            await children.start("executor", "integration_tests.fake_executor", flags, executor)
        ]
        flags = [str(children.run_dir / "engine.npz"), "--listen", engine, "--executor", executor]
        flags += ["--max-num-seqs", str(NUM_STREAMS), "--strict"]
        pids.append(await children.start("engine", "benchmarks.measured_engine", flags, engine))
        address = f"unix:{children.run_dir}/frontend.sock"
        flags = ["--engine", engine, "--listen", address, "--model-dir", str(model_path)]
        frontend = await children.start("frontend", "scheduler_svc.frontend", flags, address)
        if back:
            for pid in pids:
                pin(pid, back)
            pin(frontend, front)
            pin(os.getpid(), front)
        async with engine_driver(engine):
            pass  # ready
        yield System(children, address, frontend, len(front))


async def run_stream(client: AsyncClient, work: Work) -> Stream:
    """One greedy request over the public API, to its end. Raises BlockyardError."""
    stream = Stream([], 0, [])
    options = client.generate(
        token_ids=work.token_ids, max_tokens=work.num_output_tokens, temperature=0, ignore_eos=True
    )
    async for chunk in options:
        stream.token_ids.extend(chunk.token_ids)
        stream.num_messages += 1
        stream.arrivals_s.append(time.monotonic())
    return stream


async def load_engine(system: System, works: list[Work]) -> list[Stream]:
    """The same load without clients."""
    async with engine_driver(system.children.socket("engine")) as driver:
        driver.submit([len(w.token_ids) for w in works], [w.num_output_tokens for w in works])
        running = asyncio.create_task(driver.run())
        while driver.num_finished < len(works):
            await asyncio.wait([running], timeout=0.05)
            if running.done():
                running.result()
        running.cancel()
    return []


async def load_clients(system: System, works: list[Work]) -> list[Stream]:
    """All requests at once, each its own stream of one connection."""
    async with AsyncClient(system.address, timeout=120) as client:
        return await asyncio.gather(*(run_stream(client, work) for work in works))


async def run_phase(name: str, system: System, works: list[Work]) -> Phase:
    """One phase, from the first request to the last token."""
    front_pids = [system.frontend_pid, os.getpid()]
    if name == "saturated":
        flags = [system.address]
        pid = await system.children.start("flood", "benchmarks.flood", flags, system.address)
        pin(pid, os.sched_getaffinity(0))
        front_pids.append(pid)
        await asyncio.sleep(_FLOOD_WARM_UP_S)
    load = load_engine if name == "idle" else load_clients
    start_ns, start_cpu_s = time.monotonic_ns(), [cpu_seconds(pid) for pid in front_pids]
    streams = await load(system, works)
    end_ns = time.monotonic_ns()
    used_s = np.subtract([cpu_seconds(pid) for pid in front_pids], start_cpu_s)
    if name == "saturated":
        await system.children.stop("flood")
    cores = used_s / ((end_ns - start_ns) / 1e9)
    load_share = float(cores.sum()) / system.num_front_cpus
    return Phase(name, start_ns, end_ns, float(cores[0]), load_share, streams)


async def measure(works: list[Work]) -> tuple[list[Phase], npt.NDArray[np.int64]]:
    """All phases on one system, and the engine's loop lags [n, (time_ns, lag_ns)]."""
    async with running_system() as system:
        phases = []
        for name in _PHASES:
            print(f"phase: {name}", flush=True)
            phases.append(await run_phase(name, system, works))
        for name in ("frontend", "engine", "executor"):
            await system.children.stop(name)
        with np.load(system.children.run_dir / "engine.npz") as arrays:
            return phases, arrays["lags"]


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """What the clients of one phase saw; `num_wrong` streams differ from the reference."""

    num_tokens: int
    num_wrong: int
    messages_per_token: float
    frontend_cpu_us_per_token: float
    message_gap_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """Figures of one phase."""

    duration_s: float
    frontend_cores: float
    front_load: float
    engine_lag_ms: dict[str, float]
    streams: StreamSummary | None


def summarise(phase: Phase, lags: npt.NDArray[np.int64], expected: list[list[int]]) -> PhaseSummary:
    """Figures of a phase.

    Args:
        phase: with or without streams.
        lags: of the whole run [n, (time_ns, lag_ns)].
        expected: output ids of each stream.
    """
    # Without the burst of arrivals, which is the same work in every phase.
    is_inside = (lags[:, 0] >= phase.start_ns + _BURST_NS) & (lags[:, 0] <= phase.end_ns)
    duration_s = (phase.end_ns - phase.start_ns) / 1e9
    streams = None
    if phase.streams:
        num_tokens = sum(len(stream.token_ids) for stream in phase.streams)
        num_messages = sum(stream.num_messages for stream in phase.streams)
        gaps_s = np.concatenate([np.diff(stream.arrivals_s) for stream in phase.streams])
        pairs = zip(phase.streams, expected, strict=True)
        streams = StreamSummary(
            num_tokens=num_tokens,
            num_wrong=sum(stream.token_ids != ids for stream, ids in pairs),
            messages_per_token=num_messages / num_tokens,
            frontend_cpu_us_per_token=phase.frontend_cores * duration_s * 1e6 / num_tokens,
            message_gap_ms=percentiles(gaps_s, 1e-3),
        )
    lag_ms = percentiles(lags[is_inside, 1], 1e6)
    return PhaseSummary(duration_s, phase.frontend_cores, phase.front_load, lag_ms, streams)


def print_phases(summaries: dict[str, PhaseSummary]) -> None:
    """The table."""
    headers = (
        *("phase", "s", "front end cores", "load of its half", "engine lag p50 / p99 ms"),
        *("tokens", "messages per token", "front end us per token", "gap p50 / p99 ms"),
    )
    rows = []
    for name, summary in summaries.items():
        lag, seen = summary.engine_lag_ms, summary.streams
        row: list[object] = [name, summary.duration_s, summary.frontend_cores, summary.front_load]
        row.append(f"{lag['p50']:.2f} / {lag['p99']:.2f}")
        if seen is None:
            row += ["-"] * 4
        else:
            gap = seen.message_gap_ms
            row += [seen.num_tokens, seen.messages_per_token, seen.frontend_cpu_us_per_token]
            row.append(f"{gap['p50']:.1f} / {gap['p99']:.1f}")
        rows.append(row)
    report.print_table(f"{NUM_STREAMS} streams at {STEP_MS:g} ms steps", headers, rows)


def targets(summaries: dict[str, PhaseSummary]) -> list[Target]:
    """Nothing lost or reordered; the engine does not feel a saturated front end."""
    num_wrong = sum(s.streams.num_wrong for s in summaries.values() if s.streams is not None)
    idle, saturated = summaries["idle"], summaries["saturated"]
    ratio = saturated.engine_lag_ms["p99"] / idle.engine_lag_ms["p99"]
    return [
        Target("streams that differ from the reference", num_wrong, "<=", 0),
        Target("load of the front half when saturated", saturated.front_load, ">=", 0.9),
        Target("engine lag p99, saturated / idle", ratio, "<=", 2, "x"),
    ]


def main() -> int:
    """Measure, print, write results/streams.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_streams", description=__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="output tokens of each stream")
    flags = parser.parse_args()
    works = equal(
        NUM_STREAMS,
        _VOCAB_SIZE,
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        num_output_tokens=flags.tokens,
    )
    expected = [reference_output(w.token_ids, w.num_output_tokens, _VOCAB_SIZE) for w in works]
    try:
        phases, lags = uvloop.run(measure(works))
    except (ProcessError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    summaries = {phase.name: summarise(phase, lags, expected) for phase in phases}
    print_phases(summaries)
    reached = targets(summaries)
    are_met = report.print_targets(reached)
    results = {
        "step_ms": STEP_MS,
        "num_streams": NUM_STREAMS,
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "num_output_tokens": flags.tokens,
        "phases": {name: asdict(summary) for name, summary in summaries.items()},
    }
    report.write("streams", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

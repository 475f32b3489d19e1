"""A whole measuring session on one GPU: `python -m benchmarks.gpu_session --out DIR`.

Runs from the root of a checkout that need not be installed. For each model a server with random
weights is started, every workload is sent through the streaming client, and the server is ended.
A failure costs only what failed; nothing new is begun that the budget has no time for. DIR gets

    measured.jsonl       one line for each thing measured, at once
    gpu_session.json     everything so far beside vLLM's figures, written again after each line
    server-MODEL.log     what the server's processes said
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import uvloop

from benchmarks import report
from benchmarks.dummy_models import SHAPES, write_model
from benchmarks.engine_watch import watch
from benchmarks.gpu_record import FIRST_MODEL, Json, OutOfTimeError, Session
from benchmarks.gpu_stages import (
    HF_SECONDS,
    OVERSUBSCRIBED,
    SMALL_POOLS,
    STAGES,
    Load,
    UnknownNameError,
    chosen,
    loads_of,
)
from blockyard.bench.report import Options, measure
from blockyard.bench.summary import Summary
from blockyard.client import Endpoint
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer

_NUM_WARM_UPS: Final = 64
_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 15.0
_CEILINGS_SECONDS: Final = 45.0
_START_SECONDS: Final = 20.0
_MAX_SLOWNESS: Final = 4.0
"""A load is cut off after so many times what it should take."""

# ---- stages


async def run_session(session: Session) -> None:
    """All stages asked for, in order."""
    with tempfile.TemporaryDirectory(prefix="blockyard-session-") as folder:
        for stage in chosen(session.flags.stages, STAGES, "stage"):
            if stage == "ceilings":
                await session.attempt(stage, "ceilings", _CEILINGS_SECONDS, _ceilings(session))
            elif stage == "hf":
                await session.attempt(stage, "static batch", HF_SECONDS, _hf(session))
            elif stage == "restart":
                await _serve(session, stage, FIRST_MODEL, Path(folder), [])
            elif stage == "swap":
                await _swap(session, Path(folder))
            else:
                loads = loads_of(stage, session.flags.trace)
                names = chosen_loads(session.flags.workloads, loads)
                wanted = [load for load in loads if load.name in names]
                await _serve(session, stage, stage, Path(folder), wanted)


async def _swap(session: Session, folder: Path) -> None:
    for mode in ("recompute", "swap", "auto"):
        changes = SMALL_POOLS | {"preemption": mode}
        await _serve(session, f"swap {mode}", FIRST_MODEL, folder, [OVERSUBSCRIBED], changes)


def chosen_loads(names: str | None, loads: list[Load]) -> list[str]:
    """The names wanted of these loads; a name that only another model has is no error."""
    wanted = None if names is None else {name.strip() for name in names.split(",")}
    return [load.name for load in loads if wanted is None or load.name in wanted]


def _settings(
    session: Session, stage: str, model_path: Path, changes: Mapping[str, str]
) -> ServeSettings:
    flags = session.flags
    settings = ServeSettings(
        model=str(model_path),
        listen="127.0.0.1:0",
        device=flags.device,
        load_format=flags.load_format,
        max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        prefix_cache=flags.prefix_cache,
        frontends=flags.frontends,
        log_level=flags.log_level,
        plan_log=flags.plan_logs and flags.plan_logs / f"{stage}.plans",
    )
    return settings.model_copy(update=dict(changes))


async def _serve(
    session: Session,
    stage: str,
    model: str,
    folder: Path,
    loads: list[Load],
    changes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Start a server with changed settings, send the loads, end the server."""
    model_path = session.flags.model_dir or write_model(folder, model)
    with (session.out / f"server-{stage.replace(' ', '-')}.log").open("w", encoding="utf-8") as log:

        def keep(name: str, line: str) -> None:
            log.write(f"{name:10} | {line}\n")
            log.flush()

        server = LocalServer(_settings(session, stage, model_path, changes), keep)
        try:
            if not await session.attempt(stage, "start", _START_SECONDS, _start(session, server)):
                return
            for load in loads:
                work = _measured(session, server, load)
                await session.attempt(stage, load.name, load.seconds, work)
        finally:
            await _end(server)


def _start(session: Session, server: LocalServer) -> Callable[[], Awaitable[Json]]:
    async def work() -> Json:
        limit_s = min(_START_LIMIT_S, session.left_s)
        try:
            await asyncio.wait_for(server.start(), limit_s)
        except TimeoutError:
            raise ServeError(f"not ready after {limit_s:.0f} s") from None
        return {"ready_s": server.ready_s}

    return work


def _measured(session: Session, server: LocalServer, load: Load) -> Callable[[], Awaitable[Json]]:
    async def work() -> Json:
        limit_s = max(5.0, min(_MAX_SLOWNESS * load.seconds, session.left_s))
        options = Options(
            Endpoint(server.address),
            num_clients=session.flags.clients,
            num_warm_ups=session.flags.warm_ups,
            time_limit_s=limit_s,
        )
        await _check(server)
        async with watch(server) as inside:
            found = await asyncio.to_thread(measure, load.spec, options)
        record = {**found.document(load.spec, options), "server": inside.document()}
        for same in ("machine", "versions", "command"):  # gpu_session.json has them once
            del record[same]
        if found.num_failed:
            record["error"] = _failures(found.load, found.prefill)
        return record

    return work


async def _check(server: LocalServer) -> None:
    """Raises ServeError, which says why, if the server cannot go on."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait(), 0.05)


def _failures(*loads: Summary | None) -> str:
    errors = [error for load in loads if load is not None for error in load.errors]
    return f"{sum(load.num_failed for load in loads if load)} requests failed: {errors[:3]}"


async def _end(server: LocalServer) -> None:
    """In order if it can be had, else by force: the next stage needs the GPU's memory."""
    stopping = asyncio.create_task(server.stop())
    done, _ = await asyncio.wait({stopping}, timeout=_STOP_LIMIT_S)
    if not done:
        server.kill()
    await stopping


def _ceilings(session: Session) -> Callable[[], Awaitable[Json]]:
    async def work() -> Json:
        return await _json_of(session, "benchmarks.gpu_ceilings", *SHAPES)

    return work


def _hf(session: Session) -> Callable[[], Awaitable[Json]]:
    async def work() -> Json:
        trace = [str(session.flags.trace)] if session.flags.trace else []
        return await _json_of(session, "benchmarks.hf_static", FIRST_MODEL, *trace)

    return work


async def _json_of(session: Session, module: str, *arguments: str) -> Json:
    """Run a module to its end within the budget; what its last line says."""
    command = (sys.executable, "-m", module, *arguments)
    limit_s = max(1.0, session.left_s)

    def run() -> subprocess.CompletedProcess[str]:
        # Not asyncio's: uvloop forks by itself, which may hang once gRPC's threads run.
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)

    try:
        done = await asyncio.to_thread(run)
    except subprocess.TimeoutExpired:
        raise OutOfTimeError(f"{module} was cut off after {limit_s:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-1500:]}")
    answer: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# ---- the command


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=25.0, help="nothing is begun that would end later")
    add("--stages", help=f"comma-separated; default: {','.join(STAGES)}")
    add("--workloads", help='comma-separated, e.g. "L(1),W1,A(4)"; default: all')
    add("--out", type=Path, required=True, help="folder for the results")
    add("--trace", type=Path, help="azure_conv_2023.csv; default: generated requests")
    add("--device", default="cuda", choices=("auto", "cpu", "cuda"))
    add("--load-format", default="dummy", choices=("auto", "dummy"))
    add("--model-dir", type=Path, help="serve this model instead, in every stage")
    add("--max-model-len", type=int, default=16384)
    add("--max-num-seqs", type=int, default=512)
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--prefix-cache", action=argparse.BooleanOptionalAction, default=True)
    add("--frontends", type=int, default=2)
    add("--clients", type=int, default=8)
    add("--warm-ups", type=int, default=_NUM_WARM_UPS, help="short requests before each load")
    add("--plan-logs", type=Path, help="folder where each stage logs its plans; see step_log")
    add("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    flags = parser.parse_args()
    try:
        chosen(flags.stages, STAGES, "stage")
    except UnknownNameError as error:
        parser.error(str(error))
    return flags


def _print_results(session: Session) -> None:
    rows = [
        (f"{c.model} {c.workload} {c.what}", c.ours, c.vllm, c.speed) for c in session.comparisons()
    ]
    if rows:
        headers = ("what", "ours", "vLLM", "speed / vLLM's")
        report.print_table("Beside vLLM 0.26 on an H100", headers, rows)
    for load, reason in session.incomparable().items():
        print(f"\n{load} is not comparable with vLLM's: {reason}")
    ratio = session.results()["speed_over_transformers"]
    if ratio is not None:
        print(f"\nW1: {ratio:.1f} times transformers' static batch of 32")


def main() -> int:
    """Run the session; exit codes as in benchmarks/__init__.py, 2 if nothing was measured."""
    session = Session(_flags())
    uvloop.run(run_session(session))
    _print_results(session)
    targets = session.targets()
    are_met = report.print_targets(targets) if targets else False
    print(f"\nwritten: {session.out / 'gpu_session.json'}; {session.num_failed} failed")
    if not session.results()["records"]:
        return 2
    return 0 if are_met and not session.num_failed else 1


if __name__ == "__main__":
    sys.exit(main())

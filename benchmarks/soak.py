"""Memory under refusals and over time: `python -m benchmarks.soak`.

refusals    100,000 requests for a queue that holds 5,000: what is refused leaves nothing behind
soak        200,000 short requests, one after another on 64 streams: objects and memory stay
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import uvloop

from benchmarks import report
from benchmarks.load_system import LoadSystem, load_system
from benchmarks.processes import ProcessError
from benchmarks.report import Target
from blockyard.client import AsyncClient, BlockyardError

NUM_REFUSED: Final = 100_000
NUM_SOAKED: Final = 200_000

_MAX_WAITING: Final = 5_000
_NUM_PENDING: Final = 6_000
"""More than wait and run at once, so that some are always refused."""
_REFUSING_STEP_MS: Final = 200.0
"""80 requests a second: far less than a front end can take in."""
_NUM_STREAMS: Final = 64
_NUM_SAMPLES: Final = 20
_SAMPLE_S: Final = 2.0
_MAX_GROWTH_MIB: Final = 8.0
_MAX_OBJECT_GROWTH: Final = 0.01


@dataclass(slots=True)
class Load:
    """One load: what was answered, and what the processes held meanwhile."""

    statuses: Counter[str] = field(default_factory=Counter)
    memory_mib: list[dict[str, float]] = field(default_factory=list)
    num_objects: list[dict[str, int]] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def memory_growth_mib(self) -> float:
        """Of either process, from the most in the first quarter to the most after it."""
        quarter = max(1, len(self.memory_mib) // 4)
        early, late = self.memory_mib[:quarter], self.memory_mib[quarter:]
        return max(
            max(each[name] for each in late) - max(each[name] for each in early) for name in late[0]
        )

    @property
    def object_growth(self) -> float:
        """Of either process, from the first quarter to the last sample, as a share."""
        early = self.num_objects[len(self.num_objects) // 4]
        return max(self.num_objects[-1][name] / early[name] - 1 for name in early)


async def call(client: AsyncClient, number: int, num_tokens: int, load: Load) -> None:
    """One request, and its status."""
    prompt = [number % 1000, number // 1000 % 1000, 7, 8]
    try:
        await client.complete(
            token_ids=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True
        )
        load.statuses["OK"] += 1
    except BlockyardError as error:
        load.statuses[error.reason or error.code] += 1


async def call_all(
    client: AsyncClient, count: int, num_at_once: int, num_tokens: int, load: Load
) -> None:
    """So many requests, so many at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await call(client, number, num_tokens, load)

    await asyncio.gather(*(work() for _ in range(num_at_once)))


async def refuse(count: int) -> Load:
    """Far more than the queue takes. Raises ProcessError."""
    load = Load()
    async with (
        load_system(
            num_rows=256,
            step_ms=_REFUSING_STEP_MS,
            executor_flags=["--no-check-content"],
            engine_flags=["--max-waiting", str(_MAX_WAITING)],
        ) as system,
        AsyncClient(system.address, timeout=600) as client,
    ):
        begin_s = time.monotonic()
        watching = asyncio.create_task(_watch_memory(system, load))
        await call_all(client, count, _NUM_PENDING, 16, load)
        watching.cancel()
        load.duration_s = time.monotonic() - begin_s
    return load


async def _watch_memory(system: LoadSystem, load: Load) -> None:
    while True:
        load.memory_mib.append(system.memory_mib())
        await asyncio.sleep(_SAMPLE_S)


async def soak(count: int) -> Load:
    """Short requests without end. Raises ProcessError."""
    load = Load()
    async with (
        load_system(num_rows=_NUM_STREAMS, step_ms=0.5, counts_objects=True) as system,
        AsyncClient(system.address, timeout=60) as client,
    ):
        begin_s = time.monotonic()
        for number in range(_NUM_SAMPLES):
            await call_all(client, count // _NUM_SAMPLES, _NUM_STREAMS, 4, load)
            load.memory_mib.append(system.memory_mib())
            load.num_objects.append(await system.num_objects())
            print(f"{number + 1} of {_NUM_SAMPLES}: {load.num_objects[-1]}", flush=True)
        load.duration_s = time.monotonic() - begin_s
    return load


def refusal_targets(load: Load) -> list[Target]:
    """What is asked for while the queue is full."""
    others = {*load.statuses} - {"OK", "QUEUE_FULL"}
    return [
        Target("requests queued or refused", load.statuses.total(), ">=", NUM_REFUSED),
        Target("refused", load.statuses["QUEUE_FULL"], ">=", NUM_REFUSED / 2),
        Target("other answers", len(others), "<=", 0),
        Target("growth of memory", load.memory_growth_mib, "<=", _MAX_GROWTH_MIB, "MiB"),
    ]


def soak_targets(load: Load) -> list[Target]:
    """What is asked for over time."""
    return [
        Target("requests served", load.statuses["OK"], ">=", NUM_SOAKED),
        Target("growth of memory", load.memory_growth_mib, "<=", _MAX_GROWTH_MIB, "MiB"),
        Target("growth of objects", load.object_growth, "<=", _MAX_OBJECT_GROWTH),
    ]


def document(load: Load) -> dict[str, Any]:
    """As JSON values."""
    return {
        "statuses": dict(load.statuses),
        "duration_s": load.duration_s,
        "memory_mib": load.memory_mib,
        "num_objects": load.num_objects,
    }


_KINDS: Final = {
    "refusals": (refuse, NUM_REFUSED, refusal_targets),
    "soak": (soak, NUM_SOAKED, soak_targets),
}


def main() -> int:
    """Measure, print, write results/soak_*.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--only", choices=tuple(_KINDS))
    only = parser.parse_args().only
    are_met = True
    for name in [only] if only else _KINDS:
        run, count, targets = _KINDS[name]
        try:
            load = uvloop.run(run(count))
        except ProcessError as error:
            print(f"cannot run: {error}", file=sys.stderr)
            return 2
        rows = [(status, number) for status, number in load.statuses.most_common()]
        report.print_table(f"{name}, {load.duration_s:.0f} s", ("status", "number"), rows)
        reached = targets(load)
        are_met = report.print_targets(reached) and are_met
        report.write(f"soak_{name}", document(load), reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

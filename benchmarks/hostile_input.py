"""100,000 malformed requests and connections: `python -m benchmarks.hostile_input`.

Random bytes, requests with bytes changed or cut out, fields of wrong types and values, huge ones,
connections that do not keep to HTTP/2 or to gRPC, and slow ones, against a front end, an engine and
an executor whose answers depend on every KV block. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import sys
import tempfile
import time
from collections import Counter
from typing import Final

from benchmarks import report
from benchmarks.processes import resident_mib
from benchmarks.report import Target
from integration_tests.hostile import Outcome, attack, target

_ROUNDS: Final = 10
_CONNECTION_SHARE: Final = 0.1
_NUM_SLOW: Final = 50
_NAMES: Final = ("executor", "engine", "front end")


async def measure(count: int, seed: int) -> tuple[Outcome, list[list[float]], float]:
    """Attack in rounds; returns what became of it, memory after each round, and the time [s].

    Memory is that of executor, engine and front end [MiB].
    """
    total, memory = Outcome(), []
    num_connections = int(count * _CONNECTION_SHARE) // _ROUNDS
    num_requests = count // _ROUNDS - num_connections
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blockyard-hostile-") as directory:
        async with target(pathlib.Path(directory)) as where:
            for number in range(_ROUNDS):
                slow = _NUM_SLOW if number == 0 else 0
                outcome = await attack(where, num_requests, num_connections, slow, seed + number)
                total.requests += outcome.requests
                total.connections += outcome.connections
                total.untyped += outcome.untyped
                await where.check_unharmed()
                memory.append([resident_mib(pid) for pid in where.pids])
                print(f"{total.num_sent} sent, MiB: {memory[-1]}", flush=True)
    return total, memory, time.monotonic() - begin


def main() -> int:
    """Attack, print, write results/hostile_input.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_input", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    # An assertion here is a harm done: a wrong answer, a held block, a process that ended.
    outcome, memory, duration_s = asyncio.run(measure(flags.count, flags.seed))
    statuses: Counter[tuple[str, str]] = Counter()
    for (_, status, reason), number in outcome.requests.items():
        statuses[status, reason] += number
    rows = [(status, reason or "-", number) for (status, reason), number in statuses.most_common()]
    report.print_table("Answers to requests", ("status", "reason", "number"), rows)
    endings = [(kind, end, n) for (kind, end), n in sorted(outcome.connections.items())]
    report.print_table("Broken connections", ("kind", "how it ended", "number"), endings)
    grown = max(last - early for last, early in zip(memory[-1], memory[2], strict=True))
    reached = [
        Target("requests and connections sent", outcome.num_sent, ">=", flags.count),
        Target("answers without a typed status", len(outcome.untyped), "<=", 0),
        Target("growth of any process after the third round", grown, "<=", 10, "MiB"),
    ]
    are_met = report.print_targets(reached)
    results = {
        "seed": flags.seed,
        "duration_s": duration_s,
        "requests": [[*key, number] for key, number in sorted(outcome.requests.items())],
        "connections": [[*key, number] for key, number in sorted(outcome.connections.items())],
        "untyped": outcome.untyped[:20],
        "memory_mib": [dict(zip(_NAMES, each, strict=True)) for each in memory],
    }
    report.write("hostile_input", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

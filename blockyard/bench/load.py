"""A workload sent by several client processes, all on one clock."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final

from blockyard.bench.client import ClientJob, Done, Failed, Message, Progress, Ready, run_client
from blockyard.bench.times import RequestTimes
from blockyard.bench.workload import Workload
from blockyard.client import BlockyardError, Endpoint

_START_TIMEOUT_S: Final = 120.0
_HEAD_START_S: Final = 0.1  # for the word to reach every process
_END_GRACE_S: Final = 60.0  # to report after the time limit


class LoadError(Exception):
    """A client process that did not do its work."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and how it is loaded."""

    server: Endpoint
    vocab_size: int
    num_clients: int = 1
    seed: int = 0
    """Of prompts and sampling: other prompts for every seed."""
    time_limit_s: float | None = None
    """Of one run [s]; what has not ended then counts as failed."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the clients saw."""

    start_s: float
    """The instant that arrivals count from, of time.monotonic."""
    requests: list[RequestTimes]
    """In the workload's order."""
    client_cores: list[float]
    """CPU time per time of each process."""


Watch = Callable[[Progress], None]


def run_load(workload: Workload, target: Target, on_progress: Watch | None = None) -> LoadResult:
    """Send every request and wait for the ends; requests go round the processes in turn.

    Blocks. Raises LoadError, and BlockyardError if the server cannot be reached.
    """
    num_requests = len(workload.trace)
    num_clients = min(target.num_clients, num_requests)
    jobs = [
        ClientJob(
            target.server,
            workload,
            list(range(first, num_requests, num_clients)),
            target.vocab_size,
            target.seed,
            target.time_limit_s,
        )
        for first in range(num_clients)
    ]
    with _processes(jobs) as pipes:
        _until_ready(pipes)
        start_s = time.monotonic() + _HEAD_START_S
        for pipe in pipes:
            pipe.send(start_s)
        limit_s = target.time_limit_s
        end_s = None if limit_s is None else start_s + limit_s + _END_GRACE_S
        results = _collect(pipes, end_s, on_progress or (lambda _: None))
    requests = sorted((r for done in results for r in done.requests), key=lambda r: r.index)
    return LoadResult(start_s, requests, [done.num_cores for done in results])


@contextmanager
def _processes(jobs: list[ClientJob]) -> Iterator[list[Connection]]:
    """A process for each job, gone at the exit; yields the pipes to them."""
    context = multiprocessing.get_context("spawn")  # a fork would share gRPC's threads
    pipes: list[Connection] = []
    running: list[SpawnProcess] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=run_client, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            running.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in running:
            process.join(1.0)
            process.kill()


def _until_ready(pipes: list[Connection]) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    for pipe in pipes:
        if not pipe.poll(deadline_s - time.monotonic()):
            raise LoadError(f"a client process was not ready after {_START_TIMEOUT_S:g} s")
        message = _receive(pipe)
        if isinstance(message, Failed):
            raise BlockyardError(message.code, message.message)
        assert isinstance(message, Ready), message


def _collect(pipes: list[Connection], end_s: float | None, on_progress: Watch) -> list[Done]:
    """The results of all; raises LoadError if one is lost or nothing comes after `end_s`."""
    done: dict[Connection, Done] = {}
    while len(done) < len(pipes):
        left_s = None if end_s is None else end_s - time.monotonic()
        readable = wait([pipe for pipe in pipes if pipe not in done], left_s)
        if not readable:
            raise LoadError("a client process did not end when its time was up")
        for pipe in readable:
            assert isinstance(pipe, Connection)
            message = _receive(pipe)
            if isinstance(message, Done):
                done[pipe] = message
            else:
                assert isinstance(message, Progress), message
                on_progress(message)
    return [done[pipe] for pipe in pipes]


def _receive(pipe: Connection) -> Message:
    try:
        message: Message = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise LoadError("a client process died; its own output says why") from error
    return message

"""One client process: its share of a workload's requests, on one connection."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import uvloop

from blockyard.bench.times import ChoiceTimes, RequestTimes
from blockyard.bench.workload import Workload
from blockyard.client import AsyncClient, BlockyardError, Endpoint, GenerateOptions
from blockyard.simulate.prompts import Prompts
from blockyard.simulate.trace import NS_PER_S

CUT_SHORT: Final = "CUT_SHORT"
TIME_LIMIT: Final = "TIME_LIMIT"
_PROGRESS_INTERVAL_S: Final = 0.2
_CONNECT_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class ClientJob:
    """What one process is to send."""

    server: Endpoint
    workload: Workload
    indexes: list[int]  # of the workload's requests
    vocab_size: int
    seed: int  # of prompts and sampling
    time_limit_s: float | None  # from the start; None: no limit


@dataclass(frozen=True, slots=True)
class Ready:
    """Connected; waits for the instant to start at."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What happened since the last one."""

    num_ended: int
    num_failed: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """All that a process measured."""

    requests: list[RequestTimes]
    num_cores: float
    """CPU time used per time; near 1 the client itself is what is measured."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The process could not begin: the server cannot be reached."""

    code: str  # of BlockyardError, which does not survive the pipe
    message: str


Message = Ready | Progress | Done | Failed


def run_client(job: ClientJob, parent: Connection) -> None:
    """Body of the process: says Ready, is told when to start, reports Progress, ends with Done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this
    uvloop.run(_Client(job, parent).run())


class _Client:
    """Its counters are for Progress."""

    def __init__(self, job: ClientJob, parent: Connection) -> None:
        self._job = job
        self._parent = parent
        self._prompts = Prompts(job.workload.trace, job.vocab_size, job.seed)
        self._ended = self._failed = self._tokens = 0

    async def run(self) -> None:
        async with self._job.server.async_client(timeout=None) as client:
            try:
                await client.model(timeout=_CONNECT_TIMEOUT_S)
            except BlockyardError as error:
                self._parent.send(Failed(error.code, error.message))
                return
            self._parent.send(Ready())
            start_s: float = await asyncio.to_thread(self._parent.recv)
            cpu_s = time.process_time()
            reporting = asyncio.create_task(self._report())
            requests = await self._all_requests(client, start_s)
            seconds = time.monotonic() - start_s
            reporting.cancel()
            self._send_progress()
            self._parent.send(Done(requests, (time.process_time() - cpu_s) / seconds))

    async def _all_requests(self, client: AsyncClient, start_s: float) -> list[RequestTimes]:
        trace = self._job.workload.trace
        requests = [
            RequestTimes(
                index,
                int(trace.num_prompt_tokens[index]),
                start_s + int(trace.arrival_ns[index]) / NS_PER_S,
                choices=[ChoiceTimes() for _ in range(self._job.workload.num_samples)],
            )
            for index in self._job.indexes
        ]
        tasks = [asyncio.create_task(self._request(client, request)) for request in requests]
        limit_s = self._job.time_limit_s
        left_s = None if limit_s is None else max(0.0, start_s + limit_s - time.monotonic())
        _, late = await asyncio.wait(tasks, timeout=left_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task, request in zip(tasks, requests, strict=True):
            if task in late:
                request.error = f"{TIME_LIMIT}: not complete after {limit_s:g} s"
            else:
                task.result()  # raises if it is a bug of ours
        return requests

    async def _request(self, client: AsyncClient, request: RequestTimes) -> None:
        """Send one request when it is due and follow it to its end."""
        wait_s = request.due_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        num_wanted = int(self._job.workload.trace.num_output_tokens[request.index])
        options = self._options(request.index, num_wanted)
        request.sent_s = time.monotonic()
        try:
            prompt = self._prompts.of(request.index).tolist()
            async for chunk in client.generate(token_ids=prompt, **options):
                if chunk.token_ids:
                    num_tokens = len(chunk.token_ids)
                    request.choices[chunk.choice_index].add(num_tokens, time.monotonic())
                    self._tokens += num_tokens
                if chunk.usage is not None:
                    request.num_cached_tokens = chunk.usage.cached_tokens
                    request.num_preemptions = chunk.usage.preemptions
        except BlockyardError as error:
            request.error = str(error)
        if request.error is None and any(c.num_tokens != num_wanted for c in request.choices):
            request.error = f"{CUT_SHORT}: the server sent fewer tokens than were asked for"
        self._ended += 1
        self._failed += request.error is not None

    def _options(self, index: int, num_output_tokens: int) -> GenerateOptions:
        workload = self._job.workload
        options: GenerateOptions = {
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "skip_text": True,
            "temperature": workload.temperature,
            "top_p": workload.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": (self._job.seed << 32) + index,
        }
        if workload.num_samples > 1:
            options["num_samples"] = workload.num_samples
        return options

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_INTERVAL_S)
            self._send_progress()

    def _send_progress(self) -> None:
        self._parent.send(Progress(self._ended, self._failed, self._tokens))
        self._ended = self._failed = self._tokens = 0

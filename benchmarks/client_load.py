"""Requests through the gRPC streaming client, and when their tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.workloads import Work
from blockyard.client import AsyncClient


@dataclass(slots=True)
class StreamTimes:
    """One request. Times are of time.monotonic [s]."""

    sent_s: float
    num_output_tokens: int
    arrivals_s: list[float] = field(default_factory=list)  # of messages
    counts: list[int] = field(default_factory=list)  # tokens of each message

    @property
    def num_received(self) -> int:
        """Tokens so far."""
        return sum(self.counts)

    @property
    def first_token_s(self) -> float:
        """From sending to the first token."""
        return self.arrivals_s[0] - self.sent_s


async def run_request(
    client: AsyncClient, work: Work, times: StreamTimes | None = None
) -> StreamTimes:
    """Stream one greedy request of a forced length to its end; `times` fills as tokens come.

    Raises BlockyardError.
    """
    times = times or StreamTimes(time.monotonic(), work.num_output_tokens)
    async for chunk in client.generate(
        token_ids=work.token_ids,
        max_tokens=work.num_output_tokens,
        temperature=0,
        ignore_eos=True,
    ):
        if chunk.token_ids:
            times.arrivals_s.append(time.monotonic())
            times.counts.append(len(chunk.token_ids))
    assert times.num_received == work.num_output_tokens, "the server cut an output short"
    return times


async def run_all(address: str, works: Sequence[Work]) -> list[StreamTimes]:
    """All requests at once. Raises BlockyardError."""
    async with AsyncClient(address) as client:
        return await asyncio.gather(*(run_request(client, work) for work in works))


def duration_s(streams: Sequence[StreamTimes]) -> float:
    """From the first request to the last token."""
    return max(s.arrivals_s[-1] for s in streams) - min(s.sent_s for s in streams)


def decode_step_s(streams: Sequence[StreamTimes]) -> float:
    """Mean time of a step while every stream decodes: from the last one's first token to the
    first one's last. NaN if that never holds for two tokens.
    """
    start_s = max(stream.arrivals_s[0] for stream in streams)
    end_s = min(stream.arrivals_s[-1] for stream in streams)
    steps: list[float] = []
    for stream in streams:
        arrivals = np.array(stream.arrivals_s)
        inside = np.flatnonzero((arrivals >= start_s) & (arrivals <= end_s))
        if len(inside) >= 2:
            num_tokens = sum(stream.counts[inside[0] + 1 : inside[-1] + 1])
            steps.append((arrivals[inside[-1]] - arrivals[inside[0]]) / num_tokens)
    return float(np.median(steps)) if steps else float("nan")


def largest_gap_s(stream: StreamTimes, start_s: float, end_s: float) -> float:
    """Longest wait between two messages of which the later came within [start_s, end_s]."""
    arrivals = np.array(stream.arrivals_s)
    later = (arrivals[1:] >= start_s) & (arrivals[1:] <= end_s)
    return float(np.diff(arrivals)[later].max(initial=0.0))


def median_gap_s(streams: Sequence[StreamTimes]) -> float:
    """Between the messages of each stream so far, over all streams."""
    return float(np.median(np.concatenate([np.diff(stream.arrivals_s) for stream in streams])))

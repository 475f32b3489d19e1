"""Memory that samples and beams save by sharing: `python -m benchmarks.sharing`.

Requests of the lengths that the PagedAttention paper measured run through the whole system, with
text prompts and the real model; the engine is asked again and again what its block tables hold.
Saved memory = blocks saved / blocks without sharing, over the whole run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Never

import grpc
import grpc.aio
import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.prompts import running_text
from blockyard.engine.v1 import engine_pb2, engine_pb2_grpc
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc

_NUM_REQUESTS: Final = 16
_NUM_CONCURRENT: Final = 4
_PERIOD_S: Final = 0.02
_BRANCHES: Final = (2, 4, 6)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean lengths of a dataset, and what the paper reports for it [%], n = 2 and 6."""

    name: str
    num_prompt_tokens: int
    num_output_tokens: int
    paper_parallel: tuple[float, float]
    paper_beam: tuple[float, float]


DATASETS: Final = (
    Lengths("Alpaca-like", 19, 58, (6.1, 9.8), (37.6, 55.2)),
    Lengths("ShareGPT-like", 161, 338, (16.2, 30.5), (44.3, 66.3)),
)


@dataclass(slots=True)
class Saved:
    """Sums over all looks at the engine [token slots]."""

    num_saved: int = 0
    num_held: int = 0
    num_looks: int = 0

    @property
    def percent(self) -> float:
        """Of what the same branches would hold without sharing."""
        return 100 * self.num_saved / (self.num_saved + self.num_held)


def _request(
    prompt: list[int], num_output_tokens: int, width: int, *, is_beam: bool
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stop=pb.StopConditions(max_tokens=num_output_tokens, ignore_eos=True),
        skip_text=True,
        cache=pb.PrefixCache(off=True),  # what requests share with each other is not the question
    )
    if is_beam:
        request.beam.CopyFrom(pb.BeamSearch(width=width, num_choices=width))
    else:
        request.num_samples = width
        request.sampling.CopyFrom(pb.SamplingParams(temperature=1.0))
    return request


async def _watch(engine: engine_pb2_grpc.EngineServiceAsyncStub, saved: Saved) -> None:
    while True:
        device = (await engine.Snapshot(engine_pb2.SnapshotRequest())).device
        saved.num_saved += device.num_saved_by_sharing
        saved.num_held += device.num_stored + device.num_in_flight + device.num_unused
        saved.num_looks += 1
        await asyncio.sleep(_PERIOD_S)


async def _run(
    server: LocalServer, requests: Sequence[pb.GenerateRequest], progress: tqdm[Never]
) -> Saved:
    saved = Saved()
    slots = asyncio.Semaphore(_NUM_CONCURRENT)
    async with (
        grpc.aio.insecure_channel(server.address) as public,
        grpc.aio.insecure_channel(server.engine_address) as internal,
    ):
        stub: generate_pb2_grpc.GenerateServiceAsyncStub
        stub = generate_pb2_grpc.GenerateServiceStub(public)
        engine: engine_pb2_grpc.EngineServiceAsyncStub
        engine = engine_pb2_grpc.EngineServiceStub(internal)

        async def one(request: pb.GenerateRequest) -> None:
            async with slots:
                await stub.GenerateUnary(request)
            progress.update()

        watching = asyncio.create_task(_watch(engine, saved))
        await asyncio.gather(*(one(request) for request in requests))
        watching.cancel()
    return saved


async def measure(num_requests: int) -> list[dict[str, object]]:
    """One row of figures per dataset, kind and number of branches."""
    settings = ServeSettings(listen="127.0.0.1:0")
    text = running_text(store.resolve(settings.model))
    random = np.random.default_rng(0)
    cases = [(d, b, n) for d in DATASETS for b in (False, True) for n in _BRANCHES]
    rows: list[dict[str, object]] = []
    async with LocalServer(settings, lambda _name, _line: None) as server:
        with tqdm(total=len(cases) * num_requests, unit="request") as progress:
            for dataset, is_beam, width in cases:
                starts = random.integers(0, len(text) - dataset.num_prompt_tokens, num_requests)
                prompts = [text[s : s + dataset.num_prompt_tokens] for s in starts.tolist()]
                requests = [
                    _request(prompt, dataset.num_output_tokens, width, is_beam=is_beam)
                    for prompt in prompts
                ]
                saved = await _run(server, requests, progress)
                low, high = dataset.paper_beam if is_beam else dataset.paper_parallel
                rows.append(
                    {
                        "dataset": dataset.name,
                        "kind": "beam search" if is_beam else "parallel sampling",
                        "branches": width,
                        "saved_percent": round(saved.percent, 1),
                        "paper_percent": f"{low} to {high}",
                        "looks": saved.num_looks,
                    }
                )
    return rows


def main(arguments: list[str]) -> int:
    """Measure, print, write benchmarks/results/sharing.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing")
    parser.add_argument("--requests", type=int, default=_NUM_REQUESTS, help="of each case")
    flags = parser.parse_args(arguments)
    rows = uvloop.run(measure(flags.requests))
    report.print_table(
        "Memory saved by sharing", list(rows[0]), [list(row.values()) for row in rows]
    )
    report.write("sharing", {"requests": flags.requests, "rows": rows}, [])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

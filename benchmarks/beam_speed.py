"""What samples and beams cost in time, with the real model: `python -m benchmarks.beam_speed`.

Everything goes through the gRPC client. The time per output token is the time that 64 more tokens
take: a search of 96 tokens less one of 32. Each figure is compared with its twin in the same round,
the order within a round alternating; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Final

import grpc
import grpc.aio
import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Target
from benchmarks.workloads import random_prompt
from blockyard.common import model_dir
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.v1 import generate_pb2 as pb
from blockyard.v1 import generate_pb2_grpc as pb_grpc

_WIDTH: Final = 4
_NUM_GREEDY: Final = 28
_PROMPT_TOKENS: Final = 64
_SHORT, _LONG = 32, 96
_PREFILL_TOKENS: Final = 512


class Load:
    """Requests of one server's model."""

    def __init__(self, stub: pb_grpc.GenerateServiceAsyncStub, vocab_size: int) -> None:
        self._stub = stub
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def request(self, num_prompt_tokens: int, num_output_tokens: int) -> pb.GenerateRequest:
        """Greedy, of forced length, with a prompt that nothing is cached of."""
        prompt = random_prompt(num_prompt_tokens, self._vocab_size, self._random)
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=0.0),
            stop=pb.StopConditions(max_tokens=num_output_tokens, ignore_eos=True),
            skip_text=True,
        )

    def beams(self, num_output_tokens: int) -> list[pb.GenerateRequest]:
        """One beam search."""
        request = self.request(_PROMPT_TOKENS, num_output_tokens)
        request.beam.CopyFrom(
            # Ends at its length only: no stop token, and NEVER waits for the longest.
            pb.BeamSearch(width=_WIDTH, early_stopping=pb.EARLY_STOPPING_NEVER)
        )
        return [request]

    def rows(self, num_output_tokens: int) -> list[pb.GenerateRequest]:
        """As many independent requests as the search has beams."""
        return [self.request(_PROMPT_TOKENS, num_output_tokens) for _ in range(_WIDTH)]

    async def run(self, requests: Sequence[pb.GenerateRequest]) -> float:
        """Seconds until all are answered."""
        start_s = time.monotonic()
        await asyncio.gather(*(self._stub.GenerateUnary(request) for request in requests))
        return time.monotonic() - start_s

    async def time_per_token(self, kind: str) -> float:
        """Of `beams` or `rows` alone [s]."""
        make = getattr(self, kind)
        return (await self.run(make(_LONG)) - await self.run(make(_SHORT))) / (_LONG - _SHORT)

    async def mixed(self, kind: str) -> tuple[float, float]:
        """Times per token of `kind`, and of the greedy requests that run beside it [s]."""
        make = getattr(self, kind)
        streams = [
            _Stream(self._stub, self.request(_PROMPT_TOKENS, 4096)) for _ in range(_NUM_GREEDY)
        ]
        try:
            await asyncio.gather(*(stream.is_decoding.wait() for stream in streams))
            await self.run(make(4))  # warm
            short_s = await self.run(make(_SHORT))
            start_s, before = time.monotonic(), sum(stream.num_tokens for stream in streams)
            long_s = await self.run(make(_LONG))
            elapsed_s = time.monotonic() - start_s
            num_tokens = sum(stream.num_tokens for stream in streams) - before
        finally:
            for stream in streams:
                await stream.cancel()
        return (long_s - short_s) / (_LONG - _SHORT), elapsed_s * _NUM_GREEDY / num_tokens

    async def first_tokens(self, num_samples: int) -> float:
        """Seconds until every sample of a 512-token prompt has its first token."""
        request = self.request(_PREFILL_TOKENS, 1)
        request.num_samples = num_samples
        return await self.run([request])


class _Stream:
    """A request that goes on until cancelled."""

    def __init__(self, stub: pb_grpc.GenerateServiceAsyncStub, request: pb.GenerateRequest) -> None:
        self.num_tokens = 0
        self.is_decoding = asyncio.Event()
        self._task = asyncio.create_task(self._read(stub, request))

    async def _read(
        self, stub: pb_grpc.GenerateServiceAsyncStub, request: pb.GenerateRequest
    ) -> None:
        async for message in stub.Generate(request):
            self.num_tokens += len(message.token_ids)
            self.is_decoding.set()

    async def cancel(self) -> None:
        """End it and wait for that."""
        self._task.cancel()
        await asyncio.wait([self._task])


async def _rounds(load: Load, num_rounds: int) -> dict[str, list[float]]:
    """The ratios of each round."""
    ratios: dict[str, list[float]] = {
        name: [] for name in ("alone", "beams_in_mix", "others_in_mix", "prefill")
    }
    for number in tqdm(range(num_rounds), unit="round"):
        order = ("beams", "rows") if number % 2 else ("rows", "beams")
        alone = {kind: await load.time_per_token(kind) for kind in order}
        mixed = {kind: await load.mixed(kind) for kind in order}
        first = {
            count: await load.first_tokens(count) for count in ((4, 1) if number % 2 else (1, 4))
        }
        ratios["alone"].append(alone["beams"] / alone["rows"])
        ratios["beams_in_mix"].append(mixed["beams"][0] / mixed["rows"][0])
        ratios["others_in_mix"].append(mixed["beams"][1] / mixed["rows"][1])
        ratios["prefill"].append(first[4] / first[1])
    return ratios


async def measure(num_rounds: int) -> dict[str, list[float]]:
    """Start a server and run the rounds."""
    settings = ServeSettings(listen="127.0.0.1:0")
    vocab_size = model_dir.load(store.resolve(settings.model)).vocab_size
    async with (
        LocalServer(settings, lambda _name, _line: None) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: pb_grpc.GenerateServiceAsyncStub = pb_grpc.GenerateServiceStub(channel)
        load = Load(stub, vocab_size)
        await load.run(load.beams(8) + load.rows(8))
        return await _rounds(load, num_rounds)


def main(arguments: list[str]) -> int:
    """Measure, print, write benchmarks/results/beam_speed.json; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam_speed")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args(arguments)
    ratios = uvloop.run(measure(flags.rounds))
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    targets = [
        Target("beams / rows, alone", medians["alone"], "<=", 1.25),
        Target("beams / rows, beside 28 greedy", medians["beams_in_mix"], "<=", 1.5),
        Target("28 greedy beside beams / beside rows", medians["others_in_mix"], "<=", 1.15),
        Target("prefill for 4 samples / for 1", medians["prefill"], "<=", 1.1),
    ]
    report.print_table("Time of samples and beams", ("ratio", "median"), list(medians.items()))
    is_met = report.print_targets(targets)
    report.write("beam_speed", {"rounds": flags.rounds, **ratios}, targets)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

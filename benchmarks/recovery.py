"""Streams of the real model while its executor is killed: `python -m benchmarks.recovery`.

Under 32 greedy streams the executor process is killed with -9 at random moments, and once frozen
with SIGSTOP; the supervisor of `blockyard serve` replaces it. Every stream must complete, and its
tokens must be those of transformers' undisturbed float32 output, ties as in benchmarks.correctness.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from benchmarks import report
from benchmarks.correctness import Outcome, complete, count_ties, judge, roomy_pool_size
from benchmarks.hf_peer import HfPeer, PeerError, hf_peer
from benchmarks.hf_reference import Reference, noise, references
from benchmarks.prompts import Prompt, varied_prompts
from benchmarks.report import Target
from blockyard.client import AsyncClient, BlockyardError
from blockyard.common import model_dir
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.errors import ModelImportError

_NUM_THREADS: Final = 2
_LONGEST_PROMPT_TOKENS: Final = 200
_LONGEST_UNDISTURBED_S: Final = 3.0
_UNDER_WAY_S: Final = 0.5
"""In this time what an executor sent before its end has arrived."""


@dataclass(slots=True)
class Disturbance:
    """What was done to the executor, and how long streams stood still for it [s]."""

    num_kills: int = 0
    num_freezes: int = 0
    pauses_s: list[float] = field(default_factory=list)


class Killer:
    """Ends the executor again and again, each time after the streams have moved on."""

    def __init__(self, server: LocalServer, seed: int) -> None:
        """Disturb this server; the moments follow from `seed`."""
        self._server = server
        self._random = random.Random(seed)
        self._has_tokens = asyncio.Event()
        self.done = Disturbance()

    def on_tokens(self, _count: int) -> None:
        """Some stream got tokens."""
        self._has_tokens.set()

    async def run(self, num_kills: int, num_freezes: int, longest_undisturbed_s: float) -> None:
        """Do all of it, or as much as the streams last."""
        moves = [signal.SIGKILL] * num_kills + [signal.SIGSTOP] * num_freezes
        self._random.shuffle(moves)
        for move in moves:
            await asyncio.sleep(self._random.uniform(0.0, longest_undisturbed_s))
            await self._disturb(move)

    async def _disturb(self, move: signal.Signals) -> None:
        begin = time.monotonic()
        os.kill(self._server.pids["executor"], move)
        if move is signal.SIGKILL:
            self.done.num_kills += 1
        else:
            self.done.num_freezes += 1
        await asyncio.sleep(_UNDER_WAY_S)
        self._has_tokens.clear()
        await self._has_tokens.wait()
        self.done.pauses_s.append(time.monotonic() - begin)


async def disturbed(
    model: model_dir.ModelDir,
    prompts: Sequence[Prompt],
    found: Sequence[Reference],
    num_kills: int,
    longest_undisturbed_s: float,
) -> tuple[Outcome, Disturbance]:
    """Stream all prompts while the killer works. Raises BlockyardError if a stream fails."""
    num_output_tokens = len(found[0].output_ids)
    lengths = [len(reference.prompt_ids) + num_output_tokens for reference in found]
    settings = ServeSettings(
        model=str(model.path),
        listen="127.0.0.1:0",
        num_threads=_NUM_THREADS,
        kv_memory=roomy_pool_size(model, lengths, element_bytes=4),
    )
    async with LocalServer(settings) as server, AsyncClient(server.address) as client:
        killer = Killer(server, seed=len(prompts))
        answers = [
            asyncio.create_task(
                complete(client, prompt, num_output_tokens, on_tokens=killer.on_tokens)
            )
            for prompt in prompts
        ]
        killing = asyncio.create_task(killer.run(num_kills, 1, longest_undisturbed_s))
        outcome = judge("disturbed", found, await asyncio.gather(*answers))
        killing.cancel()
    return outcome, killer.done


async def compare(
    model_path: Path,
    num_streams: int,
    num_output_tokens: int,
    num_kills: int,
    longest_undisturbed_s: float = _LONGEST_UNDISTURBED_S,
) -> tuple[Outcome, Disturbance]:
    """Reference, disturbed run, ties."""
    model = model_dir.load(model_path)
    async with hf_peer(model_path, _NUM_THREADS) as peer:
        prompts = await short_prompts(peer, model_path, num_streams)
        found = await references(peer, prompts, num_output_tokens, model.digest)
        noise_level = await noise(peer, found)
    outcome, disturbance = await disturbed(model, prompts, found, num_kills, longest_undisturbed_s)
    async with hf_peer(model_path, _NUM_THREADS) as peer:
        await count_ties(peer, [outcome], found, noise_level)
    return outcome, disturbance


async def short_prompts(peer: HfPeer, model_path: Path, count: int) -> list[Prompt]:
    """The first prompts of benchmarks.correctness that are not long."""
    prompts = varied_prompts(model_path)
    token_ids = await peer.tokenize([prompt.input for prompt in prompts])
    pairs = zip(prompts, token_ids, strict=True)
    return [prompt for prompt, ids in pairs if len(ids) <= _LONGEST_PROMPT_TOKENS][:count]


def targets(outcome: Outcome, disturbance: Disturbance, num_kills: int) -> list[Target]:
    """All kills happened, and nothing wrong came of them."""
    return [
        Target("executor killed", disturbance.num_kills, ">=", num_kills),
        Target("executor frozen", disturbance.num_freezes, ">=", 1),
        Target("wrong outputs", outcome.num_wrong, "<=", 0),
        Target("ties", outcome.num_ties, "<=", outcome.max_ties),
    ]


def main() -> int:
    """Disturb, print, write results/recovery.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--model", default=store.DEFAULT_MODEL)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=320)
    flags = parser.parse_args()
    try:
        model_path = store.resolve(flags.model)
        run = compare(model_path, flags.streams, flags.tokens, flags.kills)
        outcome, done = uvloop.run(run)
    except (ModelImportError, ServeError, PeerError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    pauses = ", ".join(f"{pause:.1f}" for pause in done.pauses_s)
    print(f"{outcome.num_prompts} streams of {flags.tokens} tokens; pauses of {pauses} s")
    reached = targets(outcome, done, flags.kills)
    are_met = report.print_targets(reached)
    results = {
        "streams": outcome.num_prompts,
        "tokens_each": flags.tokens,
        "kills": done.num_kills,
        "freezes": done.num_freezes,
        "pauses_s": [round(pause, 2) for pause in done.pauses_s],
        "differences": len(outcome.differences),
        "ties": outcome.num_ties,
    }
    report.write("recovery", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

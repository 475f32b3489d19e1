"""The other end of hf_worker: transformers as a peer that the benchmarks compare with."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

_MAX_LINE_BYTES: Final = 1 << 27
_STOP_TIMEOUT_S: Final = 20.0


class PeerError(Exception):
    """The worker died; what it printed is on stderr."""


class HfPeer:
    """Calls on a worker process, one at a time. All raise PeerError if it dies."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    async def describe(self) -> dict[str, Any]:
        """Attention implementation, dtype, num_threads."""
        return await self._call("describe")

    async def tokenize(self, prompts: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Token ids of prompts that have `prompt`, `messages` or `token_ids`."""
        ids: list[list[int]] = (await self._call("tokenize", prompts=prompts))["token_ids"]
        return ids

    async def generate(self, token_ids: list[list[int]], num_output_tokens: int) -> float:
        """Run one static batch to a forced length; returns its time [s]."""
        answer = await self._call(
            "generate", token_ids=token_ids, num_output_tokens=num_output_tokens
        )
        assert all(len(ids) == num_output_tokens for ids in answer["token_ids"])
        return float(answer["seconds"])

    async def greedy(self, token_ids: list[list[int]], num_output_tokens: int) -> list[list[int]]:
        """Greedy output ids at batch 1 of each sequence; nothing ends them early.

        Costs least for sequences of like lengths.
        """
        answer = await self._call(
            "greedy", token_ids=token_ids, num_output_tokens=num_output_tokens
        )
        outputs: list[list[int]] = answer["token_ids"]
        assert all(len(ids) == num_output_tokens for ids in outputs)
        return outputs

    async def beams(
        self,
        token_ids: list[int],
        options: dict[str, Any],
        bound: float | None = None,
        nudges: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """`sequences`, `scores` and, within `bound`, `close` choices; see hf_beams.beam_search."""
        return await self._call(
            "beams", token_ids=token_ids, options=options, bound=bound, nudges=nudges
        )

    async def next_logits(self, token_ids: list[int], candidates: list[int]) -> list[float]:
        """Logits of `candidates` after `token_ids`, at batch 1."""
        answer = await self._call("next_logits", token_ids=token_ids, candidates=candidates)
        logits: list[float] = answer["logits"]
        return logits

    async def batch_noise(self, token_ids: list[list[int]], num_positions: int) -> float:
        """Largest logit difference between batch 1 and one batch of all these sequences."""
        answer = await self._call("batch_noise", token_ids=token_ids, num_positions=num_positions)
        return float(answer["largest_difference"])

    async def _call(self, name: str, **arguments: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"call": name, **arguments}).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise PeerError(f"the transformers process died in {name!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def hf_peer(model_dir: Path, num_threads: int) -> AsyncIterator[HfPeer]:
    """Start a worker with this model, loaded when the block begins; it ends with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.hf_worker", str(model_dir), str(num_threads)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_LINE_BYTES,
    )
    peer = HfPeer(process)
    try:
        await peer.describe()
        yield peer
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

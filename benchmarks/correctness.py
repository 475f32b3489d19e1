"""Greedy output of the whole system against transformers': `python -m benchmarks.correctness`.

Every prompt goes through client, front end, engine and executor in several modes, and must come
out token for token as transformers' float32 `generate` has it at batch 1. Float32 sums depend on
their order, so two logits may tie: a difference counts as a tie only if transformers' own logits
of the two tokens differ by less than ten times what they differ between batch 1 and batch 32.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from benchmarks import report
from benchmarks.hf_peer import HfPeer, PeerError, hf_peer
from benchmarks.hf_reference import Reference, noise, references
from benchmarks.prompts import Prompt, few_prompts, varied_prompts
from benchmarks.report import Target
from blockyard.client import AsyncClient, BlockyardError, Choice, Completion
from blockyard.common import model_dir
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.errors import ModelImportError

NUM_OUTPUT_TOKENS: Final = 64
MAX_TIED_SHARE: Final = 0.02
_TIE_FACTOR: Final = 10
_NUM_THREADS: Final = 2
BLOCK_SIZE: Final = 16
_PROOFS: Final = {
    "small pool": ("preemptions", "num_preemptions"),
    "small pool, swapped": ("blocks moved", "num_swapped_blocks"),
    "asked twice": ("cached tokens", "num_cached_tokens"),
}
"""What shows that a mode did what it is for."""
_SMALL_POOL_SHARE: Final = 0.35
"""Of what all requests would fill together: enough for any one of them, too little for all."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of serving the same requests."""

    name: str
    settings: ServeSettings
    is_sequential: bool = False
    name_again: str = ""  # of the same once more on the same server, with cached prompts


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an output first leaves the reference."""

    mode: str
    prompt: str
    position: int
    expected_id: int
    got_id: int


@dataclass(slots=True)
class Outcome:
    """What came of one mode."""

    mode: str
    num_prompts: int
    num_preemptions: int
    num_swapped_blocks: int  # to the host
    num_cached_tokens: int
    differences: list[Difference] = field(default_factory=list)
    num_ties: int = 0

    @property
    def num_wrong(self) -> int:
        """Differences that are no ties."""
        return len(self.differences) - self.num_ties

    @property
    def max_ties(self) -> int:
        """Most prompts that may end in a tie."""
        return max(1, int(MAX_TIED_SHARE * self.num_prompts))


def modes(model: model_dir.ModelDir, found: Sequence[Reference]) -> list[Mode]:
    """All modes for these requests."""
    lengths = [len(r.prompt_ids) + len(r.output_ids) for r in found]
    roomy_pool = roomy_pool_size(model, lengths, element_bytes=4)

    def settings(**options: object) -> ServeSettings:
        common = {
            "model": str(model.path),
            "listen": "127.0.0.1:0",
            "block_size": BLOCK_SIZE,
            "num_threads": _NUM_THREADS,
            "kv_memory": roomy_pool,
            # Not by this machine's speed: it tells how many run at once, and so who gives way.
            "max_num_batched_tokens": 256,
        }
        return ServeSettings.model_validate(common | options)

    small_pool = small_pool_size(model, lengths, element_bytes=4)
    swapping = {"host_memory": "1GiB", "preemption": "swap"}
    return [
        Mode("one at a time", settings(), is_sequential=True),
        Mode("all together", settings(), name_again="asked twice"),
        Mode("budget of 64 tokens", settings(max_num_batched_tokens=64, max_num_seqs=64)),
        Mode("small pool", settings(kv_memory=small_pool, preemption="recompute")),
        Mode("small pool, swapped", settings(kv_memory=small_pool, **swapping)),
        Mode("window 1", settings(window=1)),
        Mode("window 3", settings(window=3)),
    ]


def small_pool_size(model: model_dir.ModelDir, lengths: Sequence[int], element_bytes: int) -> str:
    """Memory for any one of the requests and not for all, as settings have it, e.g. 123B.

    Args:
        model: whose KV it holds.
        lengths: of each request, prompt and output [tokens].
        element_bytes: of one key or value.
    """
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    num_blocks = max(max(blocks) + 2, int(_SMALL_POOL_SHARE * sum(blocks)))
    return _pool_size(model, num_blocks, element_bytes)


def roomy_pool_size(model: model_dir.ModelDir, lengths: Sequence[int], element_bytes: int) -> str:
    """Memory for all of the requests at once, and as much again; arguments as above."""
    num_blocks = 2 * sum(-(-length // BLOCK_SIZE) for length in lengths)
    return _pool_size(model, num_blocks, element_bytes)


def _pool_size(model: model_dir.ModelDir, num_blocks: int, element_bytes: int) -> str:
    """Of so many blocks over all layers, keys and values, as settings have it."""
    config = model.config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    num_layers, num_kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    num_elements = num_blocks * 2 * num_layers * num_kv_heads * head_dim * BLOCK_SIZE
    return f"{num_elements * element_bytes}B"


async def complete(
    client: AsyncClient,
    prompt: Prompt,
    num_output_tokens: int = NUM_OUTPUT_TOKENS,
    on_tokens: Callable[[int], None] = lambda _count: None,
) -> Completion:
    """One greedy answer over the streaming call; `on_tokens` is told how many came.

    Raises BlockyardError.
    """
    token_ids: list[int] = []
    text = ""
    async for chunk in client.generate(
        prompt.input.get("prompt"),
        token_ids=prompt.input.get("token_ids"),
        messages=prompt.input.get("messages"),
        max_tokens=num_output_tokens,
        temperature=0,
        ignore_eos=True,
    ):
        on_tokens(len(chunk.token_ids))
        token_ids += chunk.token_ids
        text += chunk.text
    assert chunk.usage is not None, "the stream ended without usage"
    choice = Choice(
        index=0,
        text=text,
        token_ids=tuple(token_ids),
        finish_reason=chunk.finish_reason,
        stopped_by=chunk.stopped_by,
        logprobs=(),
        score=0.0,
    )
    return Completion((choice,), chunk.usage, chunk.request_id)


async def run_mode(
    mode: Mode, prompts: Sequence[Prompt], found: Sequence[Reference]
) -> list[Outcome]:
    """Serve all prompts, perhaps twice, and compare. Raises ServeError, BlockyardError."""
    outcomes = []
    async with LocalServer(mode.settings) as server, AsyncClient(server.address) as client:
        for name in filter(None, (mode.name, mode.name_again)):
            calls = (
                complete(client, prompt, len(reference.output_ids))
                for prompt, reference in zip(prompts, found, strict=True)
            )
            if mode.is_sequential:
                answers = [await call for call in calls]
            else:
                answers = await asyncio.gather(*calls)
            outcomes.append(judge(name, found, answers))
            print(f"{name}: {len(outcomes[-1].differences)} differences", flush=True)
    return outcomes


def judge(mode: str, found: Sequence[Reference], answers: Sequence[Completion]) -> Outcome:
    """Compare answers with their references; ties are not told from errors yet."""
    usages = [answer.usage for answer in answers]
    outcome = Outcome(
        mode,
        len(found),
        num_preemptions=sum(usage.preemptions for usage in usages),
        num_swapped_blocks=sum(usage.blocks_swapped_out for usage in usages),
        num_cached_tokens=sum(usage.cached_tokens for usage in usages),
    )
    for reference, answer in zip(found, answers, strict=True):
        # Another number means that the two sides tokenise the prompt differently.
        assert answer.usage.prompt_tokens == len(reference.prompt_ids), reference.name
        assert len(answer.token_ids) == len(reference.output_ids), reference.name
        pairs = enumerate(zip(reference.output_ids, answer.token_ids, strict=True))
        position = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
        if position is not None:
            expected_id, got_id = reference.output_ids[position], answer.token_ids[position]
            outcome.differences.append(
                Difference(mode, reference.name, position, expected_id, got_id)
            )
    return outcome


async def count_ties(
    peer: HfPeer, outcomes: Sequence[Outcome], found: Sequence[Reference], noise_level: float
) -> None:
    """Set `num_ties` of each outcome by transformers' own logits at the differing position."""
    by_name = {reference.name: reference for reference in found}
    for outcome in outcomes:
        for difference in outcome.differences:
            reference = by_name[difference.prompt]
            prefix = reference.prompt_ids + reference.output_ids[: difference.position]
            pair = [difference.expected_id, difference.got_id]
            expected, got = await peer.next_logits(prefix, pair)
            is_tie = abs(expected - got) < _TIE_FACTOR * noise_level
            outcome.num_ties += is_tie
            kind = "tie" if is_tie else "WRONG"
            print(
                f"{kind}: {difference.mode}, {difference.prompt}, output token "
                f"{difference.position}: {pair[0]} expected, {pair[1]} came; logits differ by "
                f"{abs(expected - got):.3g}",
                flush=True,
            )


async def compare(
    model_path: Path, prompts: Sequence[Prompt], num_output_tokens: int = NUM_OUTPUT_TOKENS
) -> tuple[list[Outcome], float]:
    """Reference, every mode, ties; returns the outcomes and transformers' own noise (logits)."""
    model = model_dir.load(model_path)
    async with hf_peer(model_path, _NUM_THREADS) as peer:
        found = await references(peer, prompts, num_output_tokens, model.digest)
    outcomes = []
    for mode in modes(model, found):
        outcomes += await run_mode(mode, prompts, found)
    async with hf_peer(model_path, _NUM_THREADS) as peer:
        noise_level = await noise(peer, found)
        await count_ties(peer, outcomes, found, noise_level)
    return outcomes, noise_level


def targets(outcomes: Sequence[Outcome]) -> list[Target]:
    """No wrong output in any mode, few ties, and each mode did what it is for."""
    reached = []
    for outcome in outcomes:
        name = outcome.mode
        reached.append(Target(f"{name}: wrong outputs", outcome.num_wrong, "<=", 0))
        reached.append(Target(f"{name}: ties", outcome.num_ties, "<=", outcome.max_ties))
        if name in _PROOFS:
            what, count = _PROOFS[name]
            reached.append(Target(f"{name}: {what}", getattr(outcome, count), ">=", 1))
    return reached


def main() -> int:
    """Compare, print, write results/correctness.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correctness", description=__doc__)
    parser.add_argument("--model", default=store.DEFAULT_MODEL)
    parser.add_argument("--quick", action="store_true", help="eight prompts; nothing is written")
    flags = parser.parse_args()
    try:
        model_path = store.resolve(flags.model)
        prompts = (few_prompts if flags.quick else varied_prompts)(model_path)
        outcomes, noise_level = uvloop.run(compare(model_path, prompts))
    except (ModelImportError, ServeError, PeerError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    rows = [
        (o.mode, o.num_prompts, len(o.differences), o.num_ties, o.num_preemptions) for o in outcomes
    ]
    headers = ("mode", "prompts", "differences", "of these ties", "preemptions")
    report.print_table(f"{NUM_OUTPUT_TOKENS} greedy tokens each", headers, rows)
    print(f"transformers' own logits, batch 1 against 32: {noise_level:.3g}")
    reached = targets(outcomes)
    are_met = report.print_targets(reached)
    results = {
        "model": model_path.name,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "transformers_batch_noise": noise_level,
        "prompts": [prompt.name for prompt in prompts],
        "modes": [asdict(outcome) for outcome in outcomes],
    }
    if not flags.quick:
        report.write("correctness", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

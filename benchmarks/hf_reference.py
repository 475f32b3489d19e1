"""What transformers answers to each prompt, computed once and kept in local/."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tqdm import tqdm

from benchmarks.hf_peer import HfPeer
from benchmarks.prompts import Prompt
from benchmarks.report import LOCAL_DIR
from blockyard.bench.environment import versions

_GROUP_SIZE: Final = 16
_LONGEST_IN_GROUP: Final = 300  # tokens
_NOISE_BATCH: Final = 32
_NOISE_POSITIONS: Final = 16
_LONGEST_IN_NOISE: Final = 200
"""Tokens; the logits of long rows would say nothing more and cost a minute."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One prompt's ids, and its greedy continuation at batch 1 in float32."""

    name: str
    prompt_ids: list[int]
    output_ids: list[int]


async def references(
    peer: HfPeer, prompts: Sequence[Prompt], num_output_tokens: int, model_digest: str
) -> list[Reference]:
    """One per prompt, in order; from the cache if model, prompts and libraries are the same."""
    inputs = [prompt.input for prompt in prompts]
    libraries = {name: versions()[name] for name in ("torch", "transformers", "tokenizers")}
    key = json.dumps([model_digest, inputs, num_output_tokens, libraries])
    path = LOCAL_DIR / f"hf-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [Reference(**reference) for reference in stored]
    token_ids = await peer.tokenize(inputs)
    outputs: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc="transformers") as progress:
        for group in groups(token_ids):
            answers = await peer.greedy([token_ids[i] for i in group], num_output_tokens)
            outputs |= zip(group, answers, strict=True)
            progress.update(len(group))
    found = [
        Reference(prompt.name, ids, outputs[index])
        for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True))
    ]
    LOCAL_DIR.mkdir(exist_ok=True)
    stored = [
        {"name": r.name, "prompt_ids": r.prompt_ids, "output_ids": r.output_ids} for r in found
    ]
    path.write_text(json.dumps(stored), encoding="utf-8")
    return found


def groups(token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices in groups of like lengths; a long prompt is a group of its own."""
    found: list[list[int]] = []
    for index in sorted(range(len(token_ids)), key=lambda i: len(token_ids[i])):
        is_long = len(token_ids[index]) > _LONGEST_IN_GROUP
        if not found or is_long or len(found[-1]) == _GROUP_SIZE:
            found.append([])
        found[-1].append(index)
    return found


async def noise(peer: HfPeer, found: Sequence[Reference]) -> float:
    """How far transformers' own logits differ between batch 1 and batch 32.

    The largest difference of any logit at the last positions of (up to) 32 of the outputs.
    """
    short = [r for r in found if len(r.prompt_ids) <= _LONGEST_IN_NOISE][:_NOISE_BATCH]
    sequences = [(r.prompt_ids + r.output_ids)[:-1] for r in short]
    return await peer.batch_noise(sequences, _NOISE_POSITIONS)

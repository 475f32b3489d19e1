"""The real model through ModelRunner against transformers on the same float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from blockyard.models import store
from executor_svc.tests.plans import batch, new_rows
from executor_svc.tests.runner_stack import RunnerStack

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a temperature of 100 degrees because " * 9,
    "Once",
]
NUM_OUTPUTS = 16


@pytest.fixture(scope="module")
def model_path() -> Path:
    return store.resolve(store.DEFAULT_MODEL, is_quiet=True)


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    outputs = []
    for tokens in prompts:
        generated = reference.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            do_sample=False,
            min_new_tokens=NUM_OUTPUTS,
            max_new_tokens=NUM_OUTPUTS,
            repetition_penalty=1.0,
        )
        outputs.append(generated[0, len(tokens) :].tolist())
    return outputs


@pytest.fixture
def stack(model_path: Path) -> RunnerStack:
    return RunnerStack(model_path)


def test_log_probabilities_are_close(
    stack: RunnerStack, reference: Any, prompts: list[list[int]]
) -> None:
    for row, tokens in enumerate(prompts[:3]):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        whole = stack.begin(row, tokens, num_candidates=64)
        chunked = stack.begin(row + 3, tokens, chunk=23, num_candidates=64)
        for outputs in (whole, chunked):
            theirs = logits.log_softmax(-1).numpy()[outputs.candidate_token_ids]
            np.testing.assert_allclose(outputs.candidate_logprobs, theirs, atol=2e-3)


def test_greedy_tokens_of_a_ragged_batch_equal_transformers(
    stack: RunnerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    rows = [
        {"row": row, "tokens": tokens, "blocks": stack.take(len(tokens))}
        for row, tokens in enumerate(prompts)
    ]
    counts = [(row, len(tokens)) for row, tokens in enumerate(prompts)]
    stack.lengths = dict(counts)
    steps = [stack.run(new_rows=new_rows(*rows), batch=batch(*counts))]
    steps += [stack.decode(*range(len(prompts))) for _ in range(NUM_OUTPUTS - 1)]
    sampled = np.stack([step.token_ids for step in steps], axis=1)
    # min_new_tokens keeps transformers from ending, and so changes what follows an end.
    num_compared = 0
    for tokens, theirs in zip(sampled.tolist(), expected, strict=True):
        ends = [*np.flatnonzero(np.isin(tokens, [0, 1, 2])), NUM_OUTPUTS]
        assert tokens[: ends[0]] == theirs[: ends[0]]
        num_compared += ends[0]
    assert num_compared > 2 * NUM_OUTPUTS


def test_where_blocks_lie_changes_no_bit(model_path: Path, prompts: list[list[int]]) -> None:
    results = []
    for seed in (1, 2):
        stack = RunnerStack(model_path, seed=seed)
        outputs = [stack.begin(0, prompts[2], num_candidates=64)]
        outputs += [stack.decode(0) for _ in range(5)]
        results.append([(step.candidate_token_ids, step.candidate_logprobs) for step in outputs])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])

"""Every supported family against transformers on the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executor_svc.tests.models import LLAMA3_ROPE, tiny_config, write_model
from executor_svc.tests.runner_stack import RunnerStack

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 200}),
    "qwen2": ("qwen2", {"head_dim": 32, "hidden_size": 128}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_transformers(family: str, tmp_path: Path) -> None:
    model_type, changes = FAMILIES[family]
    model = write_model(tmp_path, tiny_config(model_type, **changes))
    stack = RunnerStack(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 101, 150).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()
    one_shot = stack.begin(0, tokens, num_candidates=64)
    chunked = stack.begin(1, tokens, chunk=37, num_candidates=64)
    stack.begin(2, tokens[:-1], num_candidates=64, flags=2)
    decoded = stack.run(
        inputs={"rows": [2], "token_ids": tokens[-1:]},
        batch={"rows": [2], "num_decode_rows": 1},
    )
    for outputs in (one_shot, chunked, decoded):
        ids = outputs.candidate_token_ids
        assert np.unique(ids).size == 64
        np.testing.assert_allclose(outputs.candidate_logprobs, expected[-1, ids], atol=2e-4)
        assert outputs.token_ids[0] == ids[0] == expected[-1].argmax()


def test_a_sliding_window_limits_the_model_length(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config("mistral", sliding_window=200))
    assert RunnerStack(tmp_path).runner.info.max_model_len == 200

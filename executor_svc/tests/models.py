"""Small random models of every supported family, as directories, and the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blockyard.common import model_dir
from executor_svc.model.config import ModelConfig, parse_config

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A transformers configuration of a tiny model."""
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def parsed(**changes: Any) -> ModelConfig:
    """The same as ModelConfig, without weights."""
    fields = {**SIZES, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **changes}
    return parse_config(fields)


def write_model(
    path: Path, config: Any, seed: int = 0, matrix_spread: float = 0.2
) -> PreTrainedModel:
    """Save a random model as a model directory; returns transformers' own instance of it."""
    torch.manual_seed(seed)
    # transformers does not annotate its constructors.
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initial biases are 0 and norms 1, which would hide mistakes with them.
            spread = matrix_spread if parameter.dim() == 2 else 0.3
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, spread)
    model.save_pretrained(path)
    write_manifest(path)
    return model


def write_manifest(path: Path) -> None:
    """Make a transformers directory one of ours."""
    manifest = {"format_version": 1, "name": "tiny", "digest": "sha256:tiny", "source": "test"}
    (path / model_dir.MANIFEST_FILE).write_text(json.dumps(manifest))
    (path / model_dir.TOKENIZER_FILE).write_text("{}")

"""config.json and generation_config.json from GGUF metadata."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blockyard.models.errors import ModelImportError
from blockyard.models.gguf_source import GgufSource

ROPE_FREQS_TENSOR: Final = "rope_freqs.weight"

_CLASS_NAMES: Final = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Control tokens that end a turn although a file may name only one end-of-sequence token.
_END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>")
_CONTROL_TOKEN: Final = 3

# Every Llama 3 release uses these; only the factor differs. The file holds the resulting
# divisors alone, so they are checked against this formula's.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


def model_config(source: GgufSource) -> dict[str, Any]:
    """The Hugging Face configuration. Raises ModelImportError on what Blockyard cannot run."""
    architecture = source.architecture
    if architecture not in _CLASS_NAMES:
        raise ModelImportError(
            f"{source.path}: architecture {architecture!r} is not supported "
            f"(supported: {', '.join(_CLASS_NAMES)})"
        )
    if source.get(f"{architecture}.expert_count", int):
        raise ModelImportError(f"{source.path}: mixture-of-experts models are not supported")
    hidden_size = source.require(f"{architecture}.embedding_length", int)
    num_heads = source.require(f"{architecture}.attention.head_count", int)
    head_dim = _head_dim(source, hidden_size, num_heads)
    names = source.tensor_names
    if "token_embd.weight" not in names:
        raise ModelImportError(f"{source.path}: tensor token_embd.weight is missing")
    return {
        "architectures": [_CLASS_NAMES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": source.require(f"{architecture}.feed_forward_length", int),
        "num_hidden_layers": source.require(f"{architecture}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": source.get(f"{architecture}.attention.head_count_kv", int)
        or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": source.require(f"{architecture}.context_length", int),
        "rms_norm_eps": _float32_text(
            source.require(f"{architecture}.attention.layer_norm_rms_epsilon", float)
        ),
        "rope_theta": source.get(f"{architecture}.rope.freq_base", float) or 10000.0,
        "rope_scaling": _rope_scaling(source, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": False,
        "hidden_act": "silu",
        "vocab_size": source.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in names,
        **_special_ids(source),
        "dtype": "float32",
    }


def generation_config(source: GgufSource) -> dict[str, Any]:
    """Where generation ends: every end-of-sequence and end-of-turn id, the file's own first."""
    ids = []
    for key in ("eos", "eot", "eom"):
        token_id = source.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            ids.append(token_id)
    tokens = source.get("tokenizer.ggml.tokens", list) or []
    types = source.get("tokenizer.ggml.token_type", list) or []
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == _CONTROL_TOKEN and token in _END_OF_TURN:
            ids.append(token_id)
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ids))}
    bos = source.get("tokenizer.ggml.bos_token_id", int)
    return config if bos is None else {"bos_token_id": bos, **config}


def _special_ids(source: GgufSource) -> dict[str, int | None]:
    return {
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": source.get("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": source.get("tokenizer.ggml.padding_token_id", int),
    }


def _head_dim(source: GgufSource, hidden_size: int, num_heads: int) -> int:
    architecture = source.architecture
    if hidden_size <= 0 or num_heads <= 0:
        raise ModelImportError(f"{source.path}: embedding_length and head_count must be positive")
    key_length = source.get(f"{architecture}.attention.key_length", int)
    head_dim = key_length or hidden_size // num_heads
    value_length = source.get(f"{architecture}.attention.value_length", int) or head_dim
    rotary = source.get(f"{architecture}.rope.dimension_count", int) or head_dim
    if value_length != head_dim or rotary != head_dim:
        raise ModelImportError(
            f"{source.path}: keys of {head_dim}, values of {value_length} and rotary embedding of "
            f"{rotary} dimensions: models where these differ are not supported"
        )
    return head_dim


def _rope_scaling(source: GgufSource, head_dim: int) -> dict[str, Any] | None:
    architecture = source.architecture
    kind = source.get(f"{architecture}.rope.scaling.type", str) or "none"
    factor = source.get(f"{architecture}.rope.scaling.factor", float) or 1.0
    if ROPE_FREQS_TENSOR in source.tensor_names:
        theta = source.get(f"{architecture}.rope.freq_base", float) or 10000.0
        return _llama3_scaling(source, head_dim, theta)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    raise ModelImportError(f"{source.path}: rope scaling {kind!r} is not supported")


def _llama3_scaling(source: GgufSource, head_dim: int, theta: float) -> dict[str, Any] | None:
    divisors = source.tensor(ROPE_FREQS_TENSOR)
    factor = float(divisors.max(initial=1.0))
    expected = llama3_divisors(head_dim, theta, factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelImportError(
            f"{source.path}: {ROPE_FREQS_TENSOR} does not follow Llama 3's formula; not supported"
        )
    if factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def llama3_divisors(head_dim: int, theta: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each rotary frequency by: [head_dim / 2], from 1 to `factor`.

    Wavelengths above the original context are stretched by `factor`, those below a quarter of it
    are kept, and between the two the reciprocal is interpolated.
    """
    inverse = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_ORIGINAL * inverse / (2 * math.pi)
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _float32_text(value: float) -> float:
    """The shortest decimal with the same float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

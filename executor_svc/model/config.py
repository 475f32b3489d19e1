"""The decoder's shape, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from executor_svc.model.errors import ModelError, UnsupportedModelError
from executor_svc.model.rope import RopeConfig, parse_rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder of the Llama family. Sizes in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    is_tied: bool
    """lm_head shares the embedding's weights."""
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool

    @property
    def qkv_size(self) -> int:
        """Width of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes where its config.json says nothing."""

    qkv_bias: bool = False
    output_bias_follows: bool = True
    """o_proj has a bias whenever q, k and v have."""
    qk_norm: bool = False


_FAMILIES: Final = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, output_bias_follows=False),
    "Qwen3ForCausalLM": _Family(qk_norm=True),
}


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json. Raises UnsupportedModelError, naming the field, for what is not served.

    A sliding window is served by limiting sequences to its length, within which it has no effect.
    """
    architecture, family = _family(config)
    _refuse_extras(config)
    hidden_size = _size(config, "hidden_size")
    num_heads = _size(config, "num_attention_heads")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    head_dim = _size(config, "head_dim", hidden_size // num_heads)
    max_positions = _size(config, "max_position_embeddings")
    has_qkv_bias = bool(config.get("attention_bias", family.qkv_bias))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=min(max_positions, _window(config) or max_positions),
        rope=parse_rope(config, head_dim),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=has_qkv_bias,
        has_output_bias=has_qkv_bias and family.output_bias_follows,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        has_qk_norm=family.qk_norm,
    )


def model_len(config: ModelConfig, max_model_len: int | None) -> int:
    """Longest sequence to serve: max_model_len, or all positions. Raises ModelError beyond them."""
    longest = config.max_position_embeddings
    if max_model_len is not None and max_model_len > longest:
        raise ModelError(f"max_model_len {max_model_len} exceeds the model's {longest} positions")
    return max_model_len or longest


def _family(config: Mapping[str, Any]) -> tuple[str, _Family]:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise UnsupportedModelError(
            f"config.json: architectures must name one class, it is {architectures!r}"
        )
    name = str(architectures[0])
    if name not in _FAMILIES:
        raise UnsupportedModelError(
            f"config.json: architecture {name!r} is not supported (supported: "
            f"{', '.join(sorted(_FAMILIES))})"
        )
    return name, _FAMILIES[name]


def _refuse_extras(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"config.json: hidden_act {activation!r} is not supported")
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "config.json: quantization_config is set; quantised safetensors are not supported"
        )


def _window(config: Mapping[str, Any]) -> int:
    """Length of the sliding window [tokens]; 0 if there is none or it is switched off."""
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return 0
    return _size(config, "sliding_window")


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(
            f"config.json: {key} must be a positive integer, it is {value!r}"
        )
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UnsupportedModelError(f"config.json: {key} must be positive, it is {value!r}")
    return float(value)

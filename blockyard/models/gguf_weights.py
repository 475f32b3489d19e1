"""Tensors of a GGUF file under their Hugging Face names, in the order they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from blockyard.common.model_dir import CODE_FORMATS
from blockyard.models.errors import ModelImportError
from blockyard.models.gguf_config import ROPE_FREQS_TENSOR
from blockyard.models.gguf_source import GgufSource

Shape = tuple[int, ...]
Item = TypeVar("Item", np.float32, np.uint8)

# Folded into config.json instead.
_NOT_WEIGHTS: Final = {ROPE_FREQS_TENSOR}


class GgufWeights:
    """The weights that a configuration calls for, checked by name and shape."""

    def __init__(self, source: GgufSource, config: dict[str, Any]) -> None:
        """Raises ModelImportError if tensors are missing, unknown or of the wrong shape."""
        self._source = source
        self._config = config
        self._gguf_names = _names(config, source.architecture)
        expected = {gguf: shape for gguf, (_, shape) in self._gguf_names.items()}
        missing = sorted(expected.keys() - source.tensor_names)
        unknown = sorted(source.tensor_names - expected.keys() - _NOT_WEIGHTS)
        if missing or unknown:
            kind, names = ("misses", missing) if missing else ("has unsupported", unknown)
            raise ModelImportError(
                f"{source.path}: {kind} {len(names)} tensor(s), e.g. {names[0]}: truncated file "
                f"or not a plain {source.architecture} model"
            )
        for name, shape in expected.items():
            if source.shape(name) != shape:
                raise ModelImportError(
                    f"{source.path}: tensor {name} has shape {source.shape(name)}, "
                    f"the metadata asks for {shape}"
                )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor by its Hugging Face name, in file order."""
        return dict(self._gguf_names.values())

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """(Hugging Face name, dequantised tensor), in the order of `shapes`."""
        for gguf_name, (name, _) in self._gguf_names.items():
            yield name, self._unpermuted(gguf_name, self._source.tensor(gguf_name))

    @property
    def coded(self) -> dict[str, tuple[str, Shape]]:
        """ggml's format and shape [rows, bytes] of the codes that are kept, in file order."""
        return {
            name: (self._source.format(gguf_name), self._source.blocks(gguf_name).shape)
            for gguf_name, (name, _) in self._gguf_names.items()
            if self._source.format(gguf_name) in CODE_FORMATS
        }

    def codes(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        """(Hugging Face name, blocks [rows, bytes]), in the order of `coded`."""
        for gguf_name, (name, _) in self._gguf_names.items():
            if self._source.format(gguf_name) in CODE_FORMATS:
                yield name, self._unpermuted(gguf_name, self._source.blocks(gguf_name))

    def _unpermuted(self, name: str, tensor: npt.NDArray[Item]) -> npt.NDArray[Item]:
        """Undo llama.cpp's row order of Q and K.

        In llama files a head's rows alternate between the two halves that rotate together
        (0, d/2, 1, d/2 + 1, ...); Hugging Face keeps the halves one after the other.
        """
        if self._source.architecture != "llama":
            return tensor
        if ".attn_q." in name:
            num_heads = self._config["num_attention_heads"]
        elif ".attn_k." in name:
            num_heads = self._config["num_key_value_heads"]
        else:
            return tensor
        pairs = tensor.reshape(num_heads, self._config["head_dim"] // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _names(config: dict[str, Any], architecture: str) -> dict[str, tuple[str, Shape]]:
    """GGUF name -> (Hugging Face name, shape)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    names: dict[str, tuple[str, Shape]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden))
    }
    for layer in range(config["num_hidden_layers"]):
        for gguf, (name, shape) in _layer_names(config, architecture).items():
            names[f"blk.{layer}.{gguf}"] = (f"model.layers.{layer}.{name}", shape)
    names["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        names["output.weight"] = ("lm_head.weight", (vocab, hidden))
    return names


def _layer_names(config: dict[str, Any], architecture: str) -> dict[str, tuple[str, Shape]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    names: dict[str, tuple[str, Shape]] = {
        "attn_norm.weight": ("input_layernorm.weight", (hidden,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q_rows, hidden)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv_rows, hidden)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv_rows, hidden)),
        "attn_output.weight": ("self_attn.o_proj.weight", (hidden, q_rows)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (hidden,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, hidden)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, hidden)),
        "ffn_down.weight": ("mlp.down_proj.weight", (hidden, inner)),
    }
    if config["attention_bias"]:
        names["attn_q.bias"] = ("self_attn.q_proj.bias", (q_rows,))
        names["attn_k.bias"] = ("self_attn.k_proj.bias", (kv_rows,))
        names["attn_v.bias"] = ("self_attn.v_proj.bias", (kv_rows,))
    if config["attention_bias"] and architecture == "llama":
        names["attn_output.bias"] = ("self_attn.o_proj.bias", (hidden,))
    if architecture == "qwen3":
        names["attn_q_norm.weight"] = ("self_attn.q_norm.weight", (head_dim,))
        names["attn_k_norm.weight"] = ("self_attn.k_norm.weight", (head_dim,))
    return names

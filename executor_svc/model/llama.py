"""The Llama family: Llama, Mistral, Qwen2, Qwen3 and models of the same form such as SmolLM.

    x += o_proj(attention(norm(x)));  x += down_proj(silu(gate) * up),  gate, up = proj(norm(x))

Query, key and value projections are one matrix product, and so are gate and up. The residual
stream is updated in place; every norm but the first is fused with the addition before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from executor_svc.backends.base import Backend, Linear
from executor_svc.model.codes import stack
from executor_svc.model.config import ModelConfig
from executor_svc.model.errors import WeightsError
from executor_svc.model.weights import TensorSource

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer, in the backend's form."""

    input_norm: Tensor  # [hidden]
    qkv: Linear
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Linear
    post_attention_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear


class LlamaModel:
    """Embedding, layers and vocabulary projection on one backend."""

    def __init__(
        self, embedding: Tensor, layers: list[Layer], final_norm: Tensor, lm_head: Linear
    ) -> None:
        self.embedding = embedding  # [vocab_size, hidden]
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head

    def forward(self, backend: Backend, residual: Tensor) -> Tensor:
        """Normalised hidden states [T, hidden] of the step that the backend has begun.

        Args:
            backend: the one the weights were packed by.
            residual: [T, hidden], rows of `embedding` for all rows' tokens; overwritten.
        """
        x = backend.rms_norm(residual, self._layers[0].input_norm)
        next_norms = [layer.input_norm for layer in self._layers[1:]] + [self._final_norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            qkv = layer.qkv(x)
            backend.write_kv(index, qkv, layer.q_norm, layer.k_norm)
            attended = layer.output(backend.attend(index, qkv))
            x = backend.add_rms_norm(residual, attended, layer.post_attention_norm)
            transformed = layer.down(backend.silu_mul(layer.gate_up(x)))
            x = backend.add_rms_norm(residual, transformed, next_norm)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores [n, vocab_size] of hidden states [n, hidden]."""
        return self._lm_head(hidden)


class _Loader:
    """Reads, fuses and packs tensor by tensor, so that no weight is held twice for long."""

    def __init__(self, config: ModelConfig, weights: TensorSource, backend: Backend) -> None:
        self._config = config
        self._weights = weights
        self._backend = backend

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._backend.place(self._weights.take(name, shape))

    def linear(self, parts: dict[str, int], in_size: int, has_bias: bool) -> Linear:
        """One projection from the rows of several, given as name -> rows."""
        weight = torch.cat([self.tensor(f"{n}.weight", rows, in_size) for n, rows in parts.items()])
        bias = None
        if has_bias:
            bias = torch.cat([self.tensor(f"{n}.bias", rows) for n, rows in parts.items()])
        codes = stack([self._weights.codes(f"{n}.weight", (r, in_size)) for n, r in parts.items()])
        return self._backend.pack_linear(weight, bias, codes)

    def head(self, name: str, weight: Tensor) -> Linear:
        """The projection to the vocabulary by the tensor of this name."""
        return self._backend.pack_head(weight, self._weights.codes(name, tuple(weight.shape)))

    def layer(self, index: int) -> Layer:
        config = self._config
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        qkv = {
            f"{attention}.q_proj": q_size,
            f"{attention}.k_proj": kv_size,
            f"{attention}.v_proj": kv_size,
        }
        gate_up = {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}
        norms = [
            self.tensor(f"{attention}.{name}.weight", config.head_dim)
            if config.has_qk_norm
            else None
            for name in ("q_norm", "k_norm")
        ]
        self._weights.drop(f"{attention}.rotary_emb.inv_freq")
        return Layer(
            input_norm=self.tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self.linear(qkv, hidden, config.has_qkv_bias),
            q_norm=norms[0],
            k_norm=norms[1],
            output=self.linear({f"{attention}.o_proj": hidden}, q_size, config.has_output_bias),
            post_attention_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self.linear(gate_up, hidden, config.has_mlp_bias),
            down=self.linear({f"{mlp}.down_proj": hidden}, inner, config.has_mlp_bias),
        )


def load_llama(
    config: ModelConfig,
    weights: TensorSource,
    backend: Backend,
    progress: Callable[[float], None] = lambda _: None,
) -> LlamaModel:
    """Build the model. Raises WeightsError for missing, misshapen or unexpected tensors.

    Args:
        config: the model's shape.
        weights: opened files; all tensors are taken.
        backend: packs the projections.
        progress: called with the fraction of layers done.
    """
    loader = _Loader(config, weights, backend)
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = loader.tensor(_EMBEDDING, vocab, hidden)
    layers = []
    for index in range(config.num_layers):
        layers.append(loader.layer(index))
        progress((index + 1) / config.num_layers)
    final_norm = loader.tensor("model.norm.weight", hidden)
    if config.is_tied:
        weights.drop(_HEAD)
        lm_head = loader.head(_EMBEDDING, embedding)
    else:
        lm_head = loader.head(_HEAD, loader.tensor(_HEAD, vocab, hidden))
    if weights.remaining:
        raise WeightsError(
            f"tensor {weights.remaining[0]!r} and {len(weights.remaining) - 1} more do not belong "
            f"to a {config.architecture} of {config.num_layers} layers"
        )
    return LlamaModel(embedding, layers, final_norm, lm_head)

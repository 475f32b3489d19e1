"""Small GGUF files with random weights, as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 128, 4, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
# Not hidden size / heads; and the one that transformers assumes whatever a qwen3 file says.
QWEN3_HEAD_DIM = 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@dataclass
class TinyGguf:
    """What to write; tests change parts of it. `drop` and `extra` change the tensors."""

    architecture: str = "llama"
    pre: str | None = "smollm"
    tokenizer_model: str | None = "gpt2"
    is_tied: bool = True
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    drop: tuple[str, ...] = ()
    extra: dict[str, Array] = field(default_factory=dict)
    metadata: Callable[[Any], None] | None = None

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        writer = gguf.GGUFWriter(path, self.architecture)
        self._add_config(writer)
        if self.tokenizer_model == "gpt2":
            vocab_size = self._add_byte_level(writer)
        elif self.tokenizer_model == "llama":
            vocab_size = self._add_sentencepiece(writer)
        else:
            vocab_size = 300
            if self.tokenizer_model:
                writer.add_tokenizer_model(self.tokenizer_model)
        if self.metadata is not None:
            self.metadata(writer)
        for name, tensor in {**self._tensors(vocab_size), **self.extra}.items():
            if name not in self.drop:
                self._add_tensor(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_config(self, writer: Any) -> None:
        writer.add_name("tiny")
        writer.add_block_count(LAYERS)
        writer.add_context_length(256)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(50000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        if self.architecture == "llama":
            writer.add_rope_dimension_count(HEAD_DIM)
        if self.architecture == "qwen3":
            writer.add_key_length(QWEN3_HEAD_DIM)
            writer.add_value_length(QWEN3_HEAD_DIM)

    def _add_byte_level(self, writer: Any) -> int:
        merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("a", "n"), ("an", "d")]
        tokens = [*SPECIAL, *byte_alphabet(), *("".join(merge) for merge in merges)]
        tokens += ["<tool>", "[PAD267]"]
        kinds = [3] * 3 + [1] * (256 + len(merges)) + [4, 5]
        writer.add_tokenizer_model("gpt2")
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0].content }}")
        return len(tokens)

    def _add_sentencepiece(self, writer: Any) -> int:
        pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "n", "d", "an", "and", "▁and", "1"]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        return len(tokens)

    def _tensors(self, vocab_size: int) -> dict[str, Array]:
        rng = np.random.default_rng(7)

        def random(*shape: int) -> Array:
            return (rng.standard_normal(shape) * 0.1).astype(np.float32)

        tensors = {
            "token_embd.weight": random(vocab_size, HIDDEN),
            "output_norm.weight": random(HIDDEN),
        }
        if not self.is_tied:
            tensors["output.weight"] = random(vocab_size, HIDDEN)
        head_dim = QWEN3_HEAD_DIM if self.architecture == "qwen3" else HEAD_DIM
        q_rows, kv_rows = HEADS * head_dim, KV_HEADS * head_dim
        for layer in range(LAYERS):
            block = {
                "attn_norm.weight": random(HIDDEN),
                "attn_q.weight": random(q_rows, HIDDEN),
                "attn_k.weight": random(kv_rows, HIDDEN),
                "attn_v.weight": random(kv_rows, HIDDEN),
                "attn_output.weight": random(HIDDEN, q_rows),
                "ffn_norm.weight": random(HIDDEN),
                "ffn_gate.weight": random(INNER, HIDDEN),
                "ffn_up.weight": random(INNER, HIDDEN),
                "ffn_down.weight": random(HIDDEN, INNER),
            }
            if self.architecture == "qwen2":
                block["attn_q.bias"] = random(q_rows)
                block["attn_k.bias"] = random(kv_rows)
                block["attn_v.bias"] = random(kv_rows)
            if self.architecture == "qwen3":
                block["attn_q_norm.weight"] = random(head_dim)
                block["attn_k_norm.weight"] = random(head_dim)
            tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
        return tensors

    def _add_tensor(self, writer: Any, name: str, tensor: Array) -> None:
        # llama.cpp keeps one-dimensional tensors in float32 too.
        is_plain = self.quantisation == gguf.GGMLQuantizationType.F32 or tensor.ndim == 1
        if is_plain:
            writer.add_tensor(name, tensor)
        else:
            packed = gguf.quants.quantize(tensor, self.quantisation)
            writer.add_tensor(name, packed, raw_dtype=self.quantisation)


def transformers_model(folder: Path, gguf_file: str | None = None) -> Any:
    """A model without weights yet, of the configuration that transformers reads there."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
    classes: Any = transformers.AutoModelForCausalLM
    return classes.from_config(config, dtype=torch.float32)


def transformers_tensors(path: Path, model: Any) -> dict[str, Any]:
    """The GGUF file's tensors as transformers reads and names them for `model`."""
    from transformers import modeling_gguf_pytorch_utils

    loader: Any = modeling_gguf_pytorch_utils
    loaded = loader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    tensors: dict[str, Any] = loaded["tensors"]
    return tensors

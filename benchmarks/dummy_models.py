"""Model directories without weights: `python -m benchmarks.dummy_models FOLDER [NAME ...]`.

    blockyard serve --model FOLDER/llama-8b --load-format dummy

Shapes are public configurations; random weights change no timing. The tokenizer knows the numbers
below the vocabulary's size, one token each: "17 42" is the tokens 17 and 42.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final

from blockyard.common import model_dir

Json = dict[str, Any]

SHAPES: Final[dict[str, Json]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "smollm-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}

DEFAULT_MAX_MODEL_LEN: Final = 16384
_WORD_BEGIN: Final = "\u0120"  # a space, in the byte-level alphabet
_BOS_ID, _EOS_ID, _PAD_ID = 1, 2, 0


def config_of(name: str, max_model_len: int = DEFAULT_MAX_MODEL_LEN) -> Json:
    """The Hugging Face config.json of one of SHAPES, for sequences up to `max_model_len` tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": _BOS_ID,
        "eos_token_id": _EOS_ID,
        "pad_token_id": _PAD_ID,
        "max_position_embeddings": max_model_len,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        **SHAPES[name],
    }


def write_model(folder: Path, name: str, config: Json | None = None) -> Path:
    """Write the directory `folder`/`name`, over one that is there; returns its path.

    Args:
        folder: made if it does not exist.
        name: of the model; one of SHAPES, unless `config` is given.
        config: a Hugging Face config.json.

    Raises OSError.
    """
    config = config if config is not None else config_of(name)
    text = json.dumps(config, indent=1)
    digest = hashlib.sha256(f"dummy {text}".encode()).hexdigest()
    manifest = {
        "format_version": model_dir.FORMAT_VERSION,
        "name": name,
        "digest": digest,
        "source": "no weights",
    }
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": _BOS_ID, "eos_token_id": _EOS_ID, "pad_token_id": _PAD_ID}
    for file, content in (
        (model_dir.CONFIG_FILE, text),
        (model_dir.GENERATION_CONFIG_FILE, json.dumps(generation)),
        (model_dir.TOKENIZER_FILE, json.dumps(_tokenizer(config["vocab_size"]))),
        (model_dir.MANIFEST_FILE, json.dumps(manifest, indent=1)),
    ):
        (path / file).write_text(content + "\n", encoding="utf-8")
    return path


def _tokenizer(vocab_size: int) -> Json:
    """A tokenizer.json whose words are the ids; whatever else is written is id 0."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "WordLevel",
            "vocab": {f"{_WORD_BEGIN}{token_id}": token_id for token_id in range(vocab_size)},
            "unk_token": f"{_WORD_BEGIN}0",
        },
    }


def main() -> int:
    """Write the models named, or all; prints their paths. Exit code 2: it could not write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dummy_models", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--max-model-len", type=int, default=DEFAULT_MAX_MODEL_LEN)
    flags = parser.parse_args()
    if unknown := sorted(set(flags.names) - SHAPES.keys()):
        parser.error(f"unknown model {unknown[0]!r}; known are {', '.join(SHAPES)}")
    try:
        for name in flags.names or SHAPES:
            print(write_model(flags.folder, name, config_of(name, flags.max_model_len)))
    except OSError as error:
        print(f"cannot write: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

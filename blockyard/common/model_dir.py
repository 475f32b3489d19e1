"""A model directory: what `blockyard models import` writes and both services read.

    config.json                    the Hugging Face configuration
    generation_config.json         optional; default sampling, end-of-sequence ids
    tokenizer.json
    chat_template.jinja            optional
    model.safetensors              or shards, named by model.safetensors.index.json
    model.codes                    optional; the quantised blocks that float32 weights came from
    blockyard.json                 {"format_version": 1, "name", "digest", "source"}

Plain JSON, so that the CPU-only services can read it without the model libraries.

model.codes is a safetensors file, named otherwise because some loaders read every *.safetensors.
Its tensors have the names of the weights and hold their rows of blocks as bytes, its metadata
says in which of ggml's formats. Executors may compute with them; without the file all works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FORMAT_VERSION: Final = 1
MANIFEST_FILE: Final = "blockyard.json"
CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
CODES_FILE: Final = "model.codes"
CODE_FORMATS: Final = ("Q4_0", "Q4_1", "Q8_0")
"""Of which tensors codes are kept."""

_IMPORT_HINT: Final = "import the model again with `blockyard models import`"


class ModelDirError(Exception):
    """The directory cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling for fields that a request leaves unset.

    Values present in generation_config.json are used, whatever its `do_sample` says: a request
    that wants greedy decoding asks for temperature 0. Missing ones are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelDir:
    """A model directory that was read and checked. Weight files are looked up on demand."""

    path: Path
    name: str
    digest: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: str | None
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence that the model's positions allow [tokens]."""
    eos_token_ids: tuple[int, ...]
    """From generation_config.json, else config.json; empty if neither names one."""
    bos_token_id: int | None
    sampling_defaults: SamplingDefaults

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json, which exists."""
        return self.path / TOKENIZER_FILE

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted by name. Raises ModelDirError if one is missing.

        Read on demand: a front end works from a directory without weights.
        """
        index_path = self.path / WEIGHTS_INDEX_FILE
        if not index_path.exists():
            return [_existing(self.path / WEIGHTS_FILE)]
        weight_map = _read_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelDirError(f"{index_path}: no weight_map; {_IMPORT_HINT}")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise ModelDirError(f"{index_path}: {name!r} is not a file name; {_IMPORT_HINT}")
        return [_existing(self.path / name) for name in names]

    @property
    def codes_file(self) -> Path | None:
        """The quantised weights, if there are any."""
        path = self.path / CODES_FILE
        return path if path.exists() else None


def load(path: Path) -> ModelDir:
    """Read and check a model directory (not its weights). Raises ModelDirError."""
    if not path.is_dir():
        raise ModelDirError(f"{path}: not a directory; {_IMPORT_HINT}")
    name, digest = _read_manifest(path / MANIFEST_FILE)
    config_path = path / CONFIG_FILE
    config = _read_object(config_path)
    generation_path = path / GENERATION_CONFIG_FILE
    generation = _read_object(generation_path) if generation_path.exists() else {}
    _existing(path / TOKENIZER_FILE)
    template_path = path / CHAT_TEMPLATE_FILE
    vocab_size = _positive_int(config, "vocab_size", config_path)
    eos_ids = _token_ids(generation, "eos_token_id", generation_path, vocab_size) or _token_ids(
        config, "eos_token_id", config_path, vocab_size
    )
    bos_ids = _token_ids(config, "bos_token_id", config_path, vocab_size) or _token_ids(
        generation, "bos_token_id", generation_path, vocab_size
    )
    return ModelDir(
        path=path,
        name=name,
        digest=digest,
        config=config,
        generation_config=generation,
        chat_template=_read_text(template_path) if template_path.exists() else None,
        vocab_size=vocab_size,
        max_position_embeddings=_positive_int(config, "max_position_embeddings", config_path),
        eos_token_ids=eos_ids,
        bos_token_id=bos_ids[0] if bos_ids else None,
        sampling_defaults=_sampling_defaults(generation, generation_path),
    )


def _read_manifest(path: Path) -> tuple[str, str]:
    manifest = _read_object(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelDirError(
            f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}; "
            f"{_IMPORT_HINT}"
        )
    name, digest = manifest.get("name"), manifest.get("digest")
    if not (isinstance(name, str) and name and isinstance(digest, str) and digest):
        raise ModelDirError(f"{path}: name and digest must be non-empty strings; {_IMPORT_HINT}")
    return name, digest


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelDirError(f"{path}: missing; {_IMPORT_HINT}")
    return path


def _read_text(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelDirError(f"{path}: cannot be read ({error}); {_IMPORT_HINT}") from error


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelDirError(f"{path}: not valid JSON ({error}); {_IMPORT_HINT}") from error
    if not isinstance(value, dict):
        raise ModelDirError(f"{path}: must hold a JSON object; {_IMPORT_HINT}")
    return value


def _positive_int(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelDirError(f"{path}: {key} must be a positive integer, it is {value!r}")
    return value


def _token_ids(config: Mapping[str, Any], key: str, path: Path, vocab_size: int) -> tuple[int, ...]:
    """The id or ids under `key`; empty if there is none. Raises ModelDirError."""
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_id or not 0 <= token_id < vocab_size:
            raise ModelDirError(f"{path}: {key} holds {token_id!r}, not an id below {vocab_size}")
    return tuple(ids)


def _sampling_defaults(generation: Mapping[str, Any], path: Path) -> SamplingDefaults:
    off = SamplingDefaults()
    values: dict[str, float] = {}
    for key in ("temperature", "top_k", "top_p", "min_p"):
        value = generation.get(key)
        if value is None:
            value = getattr(off, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ModelDirError(f"{path}: {key} must be a number of at least 0, it is {value!r}")
        values[key] = value
    upper_limits = {"temperature": 100.0, "top_k": 2**32 - 1, "top_p": 1.0, "min_p": 1.0}
    for key, limit in upper_limits.items():
        if not math.isfinite(values[key]) or values[key] > limit:
            raise ModelDirError(f"{path}: {key} must be at most {limit}, it is {values[key]!r}")
    return SamplingDefaults(
        temperature=float(values["temperature"]),
        top_k=int(values["top_k"]),
        # Some files write 0 for "off".
        top_p=float(values["top_p"]) or 1.0,
        min_p=float(values["min_p"]),
    )

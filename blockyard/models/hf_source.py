"""A Hugging Face model directory, brought into Blockyard's form."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from blockyard.common import model_dir
from blockyard.models import safetensors_file
from blockyard.models.errors import ModelImportError

_SUPPORTED: Final = ("llama", "mistral", "qwen2", "qwen3")
_PICKLES: Final = ("pytorch_model*.bin", "*.pth", "consolidated*.pt")
_SLOW_TOKENIZERS: Final = ("tokenizer.model", "vocab.json")
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"


def read_config(source: Path) -> dict[str, Any]:
    """config.json, checked for what Blockyard can run. Raises ModelImportError."""
    config = _read_object(source / model_dir.CONFIG_FILE)
    model_type = config.get("model_type")
    if model_type not in _SUPPORTED:
        raise ModelImportError(
            f"{source}: model type {model_type!r} is not supported "
            f"(supported: {', '.join(_SUPPORTED)})"
        )
    if config.get("quantization_config") is not None:
        raise ModelImportError(f"{source}: quantised checkpoints are not supported")
    return config


def weight_files(source: Path) -> list[Path]:
    """The safetensors files, checked to be whole. Raises ModelImportError."""
    index = source / model_dir.WEIGHTS_INDEX_FILE
    if index.exists():
        return _shards(source, _read_object(index).get("weight_map"))
    single = source / model_dir.WEIGHTS_FILE
    if single.exists():
        safetensors_file.read_names(single)
        return [single]
    if any(next(source.glob(pattern), None) for pattern in _PICKLES):
        raise ModelImportError(
            f"{source}: only pickled weights (.bin), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise ModelImportError(f"{source}: no {model_dir.WEIGHTS_FILE}")


def copy_rest(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Write everything but the weights into `target`. Raises ModelImportError."""
    shutil.copyfile(source / model_dir.CONFIG_FILE, target / model_dir.CONFIG_FILE)
    generation = source / model_dir.GENERATION_CONFIG_FILE
    if generation.exists():
        shutil.copyfile(generation, target / model_dir.GENERATION_CONFIG_FILE)
    else:
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        (target / model_dir.GENERATION_CONFIG_FILE).write_text(json.dumps(ids, indent=2))
    _copy_tokenizer(source, target)
    if (source / _TOKENIZER_CONFIG).exists():
        shutil.copyfile(source / _TOKENIZER_CONFIG, target / _TOKENIZER_CONFIG)
    template = _chat_template(source)
    if template is not None:
        (target / model_dir.CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def link_weights(files: list[Path], target: Path) -> None:
    """Hard-link the weights into `target`, or copy them across file systems."""
    for file in files:
        # A download cache holds links; the data is what they lead to.
        real = file.resolve()
        try:
            os.link(real, target / file.name)
        except OSError:
            shutil.copyfile(real, target / file.name)
    index = files[0].parent / model_dir.WEIGHTS_INDEX_FILE
    if index.exists():
        shutil.copyfile(index, target / index.name)


def _shards(source: Path, weight_map: object) -> list[Path]:
    index = source / model_dir.WEIGHTS_INDEX_FILE
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelImportError(f"{index}: no weight_map")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        path = source / name
        if Path(name).name != name or not path.exists():
            raise ModelImportError(f"{index}: names {name!r}, which is not there")
        present = safetensors_file.read_names(path)
        missing = {tensor for tensor, file in weight_map.items() if file == name} - present
        if missing:
            raise ModelImportError(f"{path}: tensor {min(missing)} is missing")
        files.append(path)
    return files


def _copy_tokenizer(source: Path, target: Path) -> None:
    fast = source / model_dir.TOKENIZER_FILE
    if fast.exists():
        # The library raises bare Exception on bad content, so its shape is checked first.
        content = _read_object(fast)
        if not isinstance(content.get("model"), dict) or "added_tokens" not in content:
            raise ModelImportError(f"{fast}: not a tokenizer")
        shutil.copyfile(fast, target / model_dir.TOKENIZER_FILE)
        return
    if not any((source / name).exists() for name in _SLOW_TOKENIZERS):
        raise ModelImportError(f"{source}: no tokenizer (tokenizer.json or tokenizer.model)")
    _convert_tokenizer(source).save(str(target / model_dir.TOKENIZER_FILE))


def _convert_tokenizer(source: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelImportError(
            f"{source}: converting this tokenizer needs transformers: "
            "pip install 'blockyard[executor]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelImportError(f"{source}: the tokenizer cannot be converted: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelImportError(f"{source}: the tokenizer has no fast form")
    return backend


def _chat_template(source: Path) -> str | None:
    template = source / model_dir.CHAT_TEMPLATE_FILE
    if template.exists():
        return template.read_text(encoding="utf-8")
    for name in (_TOKENIZER_CONFIG, "chat_template.json"):
        path = source / name
        value = _read_object(path).get("chat_template") if path.exists() else None
        if isinstance(value, list):
            named = {item.get("name"): item.get("template") for item in value}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelImportError(f"{path.parent}: no {path.name}: not a model directory") from error
    except (OSError, ValueError) as error:
        raise ModelImportError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelImportError(f"{path}: must hold a JSON object")
    return value

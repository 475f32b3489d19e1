from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blockyard.models import store
from blockyard.models.errors import ModelImportError
from blockyard.models.tests.tiny_gguf import TinyGguf


@pytest.fixture
def source(tmp_path: Path, home: Path) -> Path:
    """A Hugging Face directory with weights, tokenizer and chat template."""
    imported = store.add(TinyGguf().write(tmp_path / "tiny.gguf"), is_quiet=True)
    folder = tmp_path / "My Model"
    shutil.copytree(imported.path, folder)
    (folder / "blockyard.json").unlink()
    shutil.rmtree(home)
    return folder


def test_directory_is_imported(source: Path, home: Path) -> None:
    model = store.add(source, is_quiet=True)
    assert model.path == home / "models" / "my-model"
    assert model.eos_token_ids == (0, 2)
    assert model.chat_template == "{{ messages[0].content }}"
    assert (model.path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    weights = model.path / "model.safetensors"
    assert weights.samefile(source / "model.safetensors")
    assert store.add(source).digest == model.digest


def test_digest_equals_that_of_the_gguf_import(source: Path, tmp_path: Path) -> None:
    from_gguf = store.add(tmp_path / "tiny.gguf", is_quiet=True)
    assert store.add(source, is_quiet=True).digest == from_gguf.digest


def test_shards(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard, half in enumerate((names[:10], names[10:])):
        file = f"model-{shard}.safetensors"
        save_file({name: tensors[name] for name in half}, source / file)
        weight_map |= dict.fromkeys(half, file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model = store.add(source, is_quiet=True)
    assert [file.name for file in model.weight_files] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": "model-1.safetensors"}}))
    with pytest.raises(ModelImportError, match="tensor extra is missing"):
        store.add(source, "other", is_quiet=True)
    index.write_text(json.dumps({"weight_map": {"extra": "../model-1.safetensors"}}))
    with pytest.raises(ModelImportError, match="not there"):
        store.add(source, "other", is_quiet=True)


@pytest.mark.parametrize(
    "template",
    ["plain", [{"name": "tool", "template": "x"}, {"name": "default", "template": "plain"}]],
)
def test_chat_template_from_tokenizer_config(template: object, source: Path) -> None:
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert store.add(source, is_quiet=True).chat_template == "plain"


def test_generation_config_is_made_from_config(source: Path) -> None:
    (source / "generation_config.json").unlink()
    model = store.add(source, is_quiet=True)
    assert dict(model.generation_config) == {"bos_token_id": 1, "eos_token_id": 0}


def test_slow_tokenizer_is_converted(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<|endoftext|>": 4}
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    model = store.add(source, is_quiet=True)
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(model.tokenizer_path)).encode("ab").tokens == ["ab"]


def _truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _truncate_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _overlong_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _bad_header(source: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (source / "model.safetensors").write_bytes(data)


def _pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _config(**changes: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated or damaged"),
    "header cut": (_truncate_header, "cut off in its header"),
    "header length": (_overlong_header, "not a safetensors file"),
    "header entry": (_bad_header, "makes no sense"),
    "pickled": (_pickled, "pickled"),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda source: (source / "config.json").unlink(), "not a model directory"),
    "broken config": (lambda source: (source / "config.json").write_text("{"), "not readable"),
    "config is a list": (
        lambda source: (source / "config.json").write_text("[]"),
        "an object|JSON",
    ),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), "no tokenizer"),
    "broken tokenizer": (
        lambda source: (source / "tokenizer.json").write_text("{}"),
        "not a tokenizer",
    ),
    "family": (_config(model_type="mamba"), "model type 'mamba'"),
    "quantised": (_config(quantization_config={"bits": 4}), "quantised"),
    "no vocabulary size": (_config(vocab_size=None), "vocab_size"),
    "eos out of range": (_config(vocab_size=1), "eos_token_id"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_directories_are_refused(case: str, source: Path, home: Path) -> None:
    damage, message = BAD_SOURCES[case]
    damage(source)
    with pytest.raises(ModelImportError, match=message) as caught:
        store.add(source, is_quiet=True)
    assert "\n" not in str(caught.value)
    assert list((home / "models").iterdir()) == []


def test_weights_are_copied_if_they_cannot_be_linked(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    model = store.add(source, is_quiet=True)
    copied = model.path / "model.safetensors"
    assert not copied.samefile(source / "model.safetensors")
    np.testing.assert_array_equal(
        load_file(copied)["model.norm.weight"],
        load_file(source / "model.safetensors")["model.norm.weight"],
    )

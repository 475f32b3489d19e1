from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockyard.common import model_dir
from blockyard.common.model_dir import ModelDirError, SamplingDefaults

CONFIG = {"vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 1}
MANIFEST = {"format_version": 1, "name": "m", "digest": "d", "source": "test"}


def write(path: Path, files: dict[str, Any]) -> Path:
    """A directory with a valid model; `files` replaces contents, None removes."""
    contents = {
        "config.json": CONFIG,
        "blockyard.json": MANIFEST,
        "tokenizer.json": {},
        "model.safetensors": "",
    } | files
    for name, content in contents.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text)
    return path


def test_reads_a_whole_directory(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 20, "do_sample": False}
    files = {"generation_config.json": generation, "chat_template.jinja": "{{ é }}"}
    model = model_dir.load(write(tmp_path, files))
    assert (model.name, model.digest, model.path) == ("m", "d", tmp_path)
    assert (model.vocab_size, model.max_position_embeddings) == (100, 64)
    assert (model.eos_token_ids, model.bos_token_id) == ((2, 3), 1)
    assert model.sampling_defaults == SamplingDefaults(temperature=0.6, top_k=20)
    assert model.chat_template == "{{ é }}"
    assert model.tokenizer_path == tmp_path / "tokenizer.json"
    assert model.weight_files == [tmp_path / "model.safetensors"]
    assert model.config["vocab_size"] == 100
    assert model.generation_config["do_sample"] is False


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    config = {"vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": None}
    model = model_dir.load(write(tmp_path, {"config.json": config}))
    assert model.chat_template is None
    assert model.generation_config == {}
    assert (model.eos_token_ids, model.bos_token_id) == ((), None)
    assert model.sampling_defaults == SamplingDefaults(1.0, 0, 1.0, 0.0)


def test_end_of_sequence_falls_back_to_config(tmp_path: Path) -> None:
    model = model_dir.load(write(tmp_path, {"generation_config.json": {}}))
    assert model.eos_token_ids == (3,)


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "w-2.safetensors", "b": "w-1.safetensors", "c": "w-2.safetensors"}}
    files = {
        "model.safetensors": None,
        "model.safetensors.index.json": index,
        "w-1.safetensors": "",
        "w-2.safetensors": "",
    }
    model = model_dir.load(write(tmp_path, files))
    assert [path.name for path in model.weight_files] == ["w-1.safetensors", "w-2.safetensors"]
    (tmp_path / "w-1.safetensors").unlink()
    with pytest.raises(ModelDirError, match=r"w-1.safetensors: missing"):
        _ = model.weight_files


def test_front_end_needs_no_weights(tmp_path: Path) -> None:
    model = model_dir.load(write(tmp_path, {"model.safetensors": None}))
    with pytest.raises(ModelDirError, match=r"model.safetensors: missing; import the model"):
        _ = model.weight_files


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "sub/w.safetensors"])
def test_index_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"a": name}}
    model = model_dir.load(write(tmp_path, {"model.safetensors.index.json": index}))
    with pytest.raises(ModelDirError, match="is not a file name"):
        _ = model.weight_files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "config.json: missing"),
        ({"blockyard.json": None}, "blockyard.json: missing; import the model again"),
        ({"tokenizer.json": None}, "tokenizer.json: missing"),
        ({"config.json": "{"}, "config.json: not valid JSON"),
        ({"config.json": [1]}, "config.json: must hold a JSON object"),
        ({"blockyard.json": MANIFEST | {"format_version": 2}}, "format_version is 2, .* reads 1"),
        ({"blockyard.json": MANIFEST | {"digest": ""}}, "blockyard.json: name and digest"),
        ({"blockyard.json": MANIFEST | {"name": 7}}, "blockyard.json: name and digest"),
        ({"config.json": CONFIG | {"vocab_size": 0}}, "vocab_size must be a positive integer"),
        ({"config.json": CONFIG | {"vocab_size": True}}, "vocab_size must be"),
        ({"config.json": CONFIG | {"max_position_embeddings": "64"}}, "max_position_embeddings"),
        ({"config.json": CONFIG | {"eos_token_id": 100}}, "eos_token_id holds 100"),
        ({"config.json": CONFIG | {"bos_token_id": "<s>"}}, "bos_token_id holds '<s>'"),
        ({"generation_config.json": {"eos_token_id": [2, -1]}}, "generation_config.json: eos.*-1"),
        ({"generation_config.json": {"temperature": -1}}, "temperature must be a number"),
        ({"generation_config.json": {"temperature": "1"}}, "temperature must be a number"),
        ({"generation_config.json": '{"temperature": NaN}'}, "temperature must be a number"),
        ({"generation_config.json": '{"temperature": Infinity}'}, "temperature must be at most"),
        ({"generation_config.json": {"top_p": 1.5}}, "top_p must be at most 1"),
    ],
)
def test_bad_directories_name_the_file(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelDirError, match=message):
        model_dir.load(write(tmp_path, files))


def test_index_without_weights(tmp_path: Path) -> None:
    model = model_dir.load(write(tmp_path, {"model.safetensors.index.json": {"weight_map": {}}}))
    with pytest.raises(ModelDirError, match="no weight_map"):
        _ = model.weight_files


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match="not a directory; import the model"):
        model_dir.load(tmp_path / "none")


def test_not_text(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelDirError, match=r"config.json: cannot be read"):
        model_dir.load(tmp_path)

"""Weight files made by somebody else: what is wrong with them is said, with file and tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor_svc.backends.reference import ReferenceBackend
from executor_svc.model.errors import WeightsError
from executor_svc.model.llama import load_llama
from executor_svc.model.weights import Weights
from executor_svc.tests.models import parsed, tiny_config, write_model

Tensors = dict[str, torch.Tensor]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path, tiny_config(tie_word_embeddings=True))
    return path


def load(*files: Path) -> None:
    config = parsed(tie_word_embeddings=True)
    backend = ReferenceBackend(config, 16, 64)
    with Weights(files) as weights:
        load_llama(config, weights, backend)


def test_a_good_file_loads(model_path: Path) -> None:
    load(model_path / "model.safetensors")


def test_shards_load_and_keep_their_precision(model_path: Path, tmp_path: Path) -> None:
    tensors = load_file(model_path / "model.safetensors")
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name].bfloat16() for name in part}, tmp_path / f"{index}.safetensors"
        )
    load(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    with Weights([tmp_path / "0.safetensors"]) as weights:
        taken = weights.take(names[0], tuple(tensors[names[0]].shape))
        assert taken.dtype == torch.bfloat16
        with pytest.raises(WeightsError, match="none of the weight files"):
            weights.take(names[0], tuple(taken.shape))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(model_path: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((model_path / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        load(path)


def test_a_damaged_header_is_named(model_path: Path, tmp_path: Path) -> None:
    data = bytearray((model_path / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        load(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="pickled"):
        Weights([path])


def test_no_file_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no safetensors"):
        Weights([])
    with pytest.raises(WeightsError, match=r"gone\.safetensors"):
        Weights([tmp_path / "gone.safetensors"])


def _drop(tensors: Tensors) -> None:
    del tensors[K_PROJ]


def _shrink(tensors: Tensors) -> None:
    tensors[K_PROJ] = tensors[K_PROJ][:-1].contiguous()


def _add(tensors: Tensors) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(160, 96)


def _count(tensors: Tensors) -> None:
    tensors[K_PROJ] = tensors[K_PROJ].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, f"{K_PROJ}.*none of the weight files"),
        (_shrink, rf"changed\.safetensors: .*{K_PROJ}.*\(63, 96\), expected \(64, 96\)"),
        (_add, r"model\.layers\.3\.mlp\.up_proj\.weight.*do not belong"),
        (_count, f"{K_PROJ}.*int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    model_path: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = load_file(model_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(WeightsError, match=message):
        load(tmp_path / "changed.safetensors")


def test_a_tensor_in_two_files_is_an_error(model_path: Path) -> None:
    with pytest.raises(WeightsError, match="is also in"):
        load(model_path / "model.safetensors", model_path / "model.safetensors")

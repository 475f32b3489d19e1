from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from blockyard.common import model_dir
from blockyard.models import store
from blockyard.models.errors import ModelImportError
from blockyard.models.gguf_config import llama3_divisors
from blockyard.models.tests.tiny_gguf import (
    HEAD_DIM,
    HIDDEN,
    TinyGguf,
    transformers_model,
    transformers_tensors,
)

pytestmark = pytest.mark.usefixtures("home")


def _imported(tiny: TinyGguf, path: Path) -> model_dir.ModelDir:
    return store.add(tiny.write(path / "tiny.gguf"), is_quiet=True)


def _config(tiny: TinyGguf, path: Path) -> dict[str, Any]:
    return dict(_imported(tiny, path).config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_and_logits_equal_transformers(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = _imported(TinyGguf(architecture, "gpt-2", is_tied=is_tied), tmp_path)
    expected = transformers_model(tmp_path, "tiny.gguf")
    theirs = transformers_tensors(tmp_path / "tiny.gguf", expected)
    expected.load_state_dict(theirs, strict=not is_tied)
    expected.tie_weights()
    expected.eval()
    ours = load_file(model.path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    actual = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    assert type(actual) is type(expected)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(actual(tokens).logits, expected(tokens).logits)


def test_metadata_becomes_config_and_generation_config(tmp_path: Path) -> None:
    model = _imported(TinyGguf(), tmp_path)
    assert model.name == "tiny"
    assert model.max_position_embeddings == 256
    assert model.config["head_dim"] == HEAD_DIM
    assert model.config["rms_norm_eps"] == 1e-5
    assert model.config["rope_theta"] == 50000.0
    assert model.config["tie_word_embeddings"] is True
    # The file names <|endoftext|>; <|im_end|> is a control token of the vocabulary.
    assert model.eos_token_ids == (0, 2)
    assert model.bos_token_id == 1
    assert model.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_tensors_are_dequantised(kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    plain = load_file(_imported(TinyGguf(), tmp_path).path / "model.safetensors")
    path = TinyGguf(quantisation=quantisation).write(tmp_path / "packed.gguf")
    packed = load_file(store.add(path, is_quiet=True).path / "model.safetensors")
    for name, tensor in plain.items():
        scale = np.abs(tensor).max()
        assert packed[name].dtype == np.float32
        np.testing.assert_allclose(packed[name], tensor, atol=scale / 7, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "num_coded"), [("Q4_0", 15), ("Q4_1", 15), ("Q8_0", 15), ("F16", 0)]
)
def test_blocks_are_kept_that_decode_to_the_weights(
    kind: str, num_coded: int, tmp_path: Path
) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    model = _imported(TinyGguf(quantisation=quantisation), tmp_path)
    assert model.codes_file is not None
    codes = load_file(model.codes_file)
    weights = load_file(model.path / "model.safetensors")
    assert len(codes) == num_coded
    for name, blocks in codes.items():
        decoded = gguf.quants.dequantize(blocks, quantisation)
        np.testing.assert_array_equal(decoded, weights[name], err_msg=name)


def test_an_import_of_before_gets_its_blocks_when_it_is_used(tmp_path: Path) -> None:
    tiny = TinyGguf(quantisation=gguf.GGMLQuantizationType.Q8_0)
    model = _imported(tiny, tmp_path)
    assert model.codes_file is not None
    before = model.codes_file.read_bytes()
    model.codes_file.unlink()
    assert store.resolve(model.name) == model.path
    assert model.codes_file.read_bytes() == before
    model.codes_file.unlink()
    (tmp_path / "tiny.gguf").unlink()
    assert store.resolve(model.name) == model.path
    assert model.codes_file is None


def test_llama3_rope_factors_become_rope_scaling(tmp_path: Path) -> None:
    divisors = llama3_divisors(HEAD_DIM, 50000.0, 32.0).astype(np.float32)
    assert divisors[0] == 1.0
    assert divisors[-1] == 32.0
    config = _config(TinyGguf(extra={"rope_freqs.weight": divisors}), tmp_path)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_llama3_divisors_equal_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        head_dim=128, rope_parameters=scaling, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(llama3_divisors(128, 500000.0, 8.0), plain / scaled, rtol=1e-4)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = _config(TinyGguf(metadata=linear), tmp_path)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def _yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def _bad_rope_factors() -> dict[str, Any]:
    return {"rope_freqs.weight": np.linspace(1, 32, HEAD_DIM // 2, dtype=np.float32)}


BAD_FILES: dict[str, tuple[TinyGguf, str]] = {
    "architecture": (TinyGguf("gemma2"), "architecture 'gemma2' is not supported"),
    "experts": (TinyGguf(metadata=lambda w: w.add_expert_count(8)), "mixture-of-experts"),
    "yarn": (TinyGguf(metadata=_yarn), "rope scaling 'yarn'"),
    "rope factors": (TinyGguf(extra=_bad_rope_factors()), "Llama 3's formula"),
    "partial rotary": (
        TinyGguf("qwen2", metadata=lambda w: w.add_rope_dimension_count(8)),
        "models where these differ",
    ),
    "missing tensor": (TinyGguf(drop=("blk.1.ffn_up.weight",)), "misses 1 tensor"),
    "no embedding": (TinyGguf(drop=("token_embd.weight",)), "token_embd.weight is missing"),
    "unknown tensor": (
        TinyGguf(extra={"blk.0.ssm_a": np.ones(4, np.float32)}),
        "unsupported 1 tensor",
    ),
    "wrong shape": (
        TinyGguf(extra={"output_norm.weight": np.ones(HIDDEN + 1, np.float32)}),
        "has shape",
    ),
    "no tokenizer": (TinyGguf(tokenizer_model=None), "holds no tokenizer"),
    "tokenizer model": (TinyGguf(tokenizer_model="rwkv"), "tokenizer model 'rwkv'"),
    "pre-tokenizer": (TinyGguf(pre="poro-chat"), "pre-tokenizer 'poro-chat'"),
    "type of a key": (
        TinyGguf(metadata=lambda w: w.add_string("llama.attention.key_length", "many")),
        "is a str, not a int",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_unsupported_files_are_refused(case: str, tmp_path: Path, home: Path) -> None:
    tiny, message = BAD_FILES[case]
    with pytest.raises(ModelImportError, match=message) as caught:
        _imported(tiny, tmp_path)
    assert "\n" not in str(caught.value)
    assert list((home / "models").iterdir()) == []


def test_unquantisable_type_is_refused(tmp_path: Path) -> None:
    packed: Any = np.zeros((HIDDEN, HIDDEN), np.int8)

    class Odd(TinyGguf):
        def _add_tensor(self, writer: Any, name: str, tensor: Any) -> None:
            odd = packed if name == "blk.0.attn_q.weight" else tensor
            super()._add_tensor(writer, name, odd)

    with pytest.raises(ModelImportError, match="quantised as I8"):
        _imported(Odd(), tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file_is_refused(kept: float, tmp_path: Path, home: Path) -> None:
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ModelImportError, match=r"truncated|not a GGUF"):
        store.add(path, is_quiet=True)
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"GGML" + data[4:],
        lambda data: data[:4] + b"\x63\0\0\0" + data[8:],
        lambda data: data[:24] + b"\xff" * 8 + data[32:],
        lambda data: b"PK\x03\x04" * 100,
    ],
    ids=["magic", "version", "key length", "zip"],
)
def test_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelImportError):
        store.add(path, is_quiet=True)


def test_digest_depends_on_weights_and_config_alone(tmp_path: Path) -> None:
    def digest(name: str, tiny: TinyGguf) -> str:
        model = store.add(tiny.write(tmp_path / f"{name}.gguf"), is_quiet=True)
        manifest = json.loads((model.path / "blockyard.json").read_text())
        assert manifest["digest"] == model.digest
        return model.digest

    first = digest("a", TinyGguf())
    assert digest("b", TinyGguf()) == first
    assert digest("c", TinyGguf(is_tied=False)) != first
    context = TinyGguf(metadata=lambda w: w.add_rope_scaling_factor(1.0))
    assert digest("d", context) == first

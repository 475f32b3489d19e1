from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import dummy_models
from blockyard.common import model_dir
from executor_svc.model.config import parse_config
from scheduler_svc.frontend.detokenizer import new_detokenizer
from scheduler_svc.frontend.tokenizer import PromptTokenizer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-8b", 8_030_261_248), ("llama-1b", 1_235_814_400), ("smollm-135m", 134_515_008)],
)
def test_the_executor_reads_the_public_shape(name: str, parameters: int, tmp_path: Path) -> None:
    model = model_dir.load(dummy_models.write_model(tmp_path, name))
    assert (model.name, model.max_position_embeddings) == (name, 16384)
    assert (model.bos_token_id, model.eos_token_ids) == (1, (2,))
    config = parse_config(model.config)
    layer = (
        config.hidden_size * (config.qkv_size + config.num_heads * config.head_dim + 2)
        + 3 * config.hidden_size * config.intermediate_size
    )
    embeddings = config.vocab_size * config.hidden_size * (1 if config.is_tied else 2)
    assert config.num_layers * layer + embeddings + config.hidden_size == parameters


async def test_the_front_end_reads_the_tokenizer(tmp_path: Path) -> None:
    model = model_dir.load(dummy_models.write_model(tmp_path, "smollm-135m"))
    tokenizer = PromptTokenizer(model)
    assert not tokenizer.has_chat_template
    assert await tokenizer.encode_prompt("17 49151 what 3") == [17, 49151, 0, 3]
    detokenizer = new_detokenizer(tokenizer.vocabulary)
    assert detokenizer.feed([17, 49151]) + detokenizer.flush() == " 17 49151"


def test_every_shape_and_length_is_another_model(tmp_path: Path) -> None:
    paths = [dummy_models.write_model(tmp_path, name) for name in dummy_models.SHAPES]
    short = dummy_models.config_of("llama-1b", 2048)
    paths.append(dummy_models.write_model(tmp_path / "short", "llama-1b", short))
    digests = {model_dir.load(path).digest for path in paths}
    assert len(digests) == len(paths)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dummy_models", str(tmp_path), "smollm-135m"])
    assert dummy_models.main() == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "smollm-135m")]
    monkeypatch.setattr(sys, "argv", ["dummy_models", str(tmp_path), "llama-9b"])
    with pytest.raises(SystemExit):
        dummy_models.main()
    assert "unknown model 'llama-9b'" in capsys.readouterr().err

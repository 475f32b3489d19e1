"""What config.json may and may not say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executor_svc.model.errors import UnsupportedModelError
from executor_svc.model.rope import RopeConfig
from executor_svc.tests.models import LLAMA3_ROPE, parsed


def test_defaults_follow_the_family() -> None:
    llama = parsed()
    assert (llama.has_qkv_bias, llama.has_output_bias, llama.has_qk_norm) == (False, False, False)
    biased = parsed(attention_bias=True)
    assert (biased.has_qkv_bias, biased.has_output_bias) == (True, True)
    qwen2 = parsed(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.has_qkv_bias, qwen2.has_output_bias) == (True, False)
    assert parsed(architectures=["Qwen3ForCausalLM"]).has_qk_norm
    assert parsed(num_key_value_heads=None).num_kv_heads == 4
    assert parsed(head_dim=None).head_dim == 24


def test_a_window_limits_the_length_unless_switched_off() -> None:
    assert parsed(sliding_window=64).max_position_embeddings == 64
    assert parsed(sliding_window=None).max_position_embeddings == 512
    assert parsed(sliding_window=64, use_sliding_window=False).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "RoPE"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parsed(**changes)


def test_old_and_new_rope_fields_mean_the_same() -> None:
    old = parsed(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}).rope
    new = parsed(rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}).rope
    assert old == new == RopeConfig(32, 5000.0, "linear", 2.0)


def test_linear_scaling_stretches_positions() -> None:
    plain = RopeConfig(32, 10000.0).angles(50)
    stretched = RopeConfig(32, 10000.0, "linear", 2.0).angles(100)
    np.testing.assert_allclose(stretched[::2], plain, atol=2e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = RopeConfig(32, 10000.0).inverse_frequencies()
    scaled = parsed(rope_parameters=LLAMA3_ROPE).rope.inverse_frequencies()
    waves = 64 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[waves > 4], plain[waves > 4])
    np.testing.assert_allclose(scaled[waves < 1], plain[waves < 1] / 8, rtol=1e-6)
    between = (waves > 1) & (waves < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()

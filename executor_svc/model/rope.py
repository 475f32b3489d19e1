"""Rotary position embeddings: frequencies and the table of angles.

RoPE: https://arxiv.org/abs/2104.09864. "llama3" scaling stretches the long wavelengths only, as
published with Llama 3.1; "linear" stretches all (position interpolation,
https://arxiv.org/abs/2306.15595).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from executor_svc.model.errors import UnsupportedModelError

FloatArray = npt.NDArray[np.float32]
RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Frequencies of a head of `head_dim` elements."""

    head_dim: int
    theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse_frequencies(self) -> FloatArray:
        """Radians per token, [head_dim / 2]."""
        # In float32 throughout, as the models were trained: positions in the thousands make the
        # last bits visible.
        exponents = np.arange(0, self.head_dim, 2).astype(np.float32) / np.float32(self.head_dim)
        frequencies: FloatArray = np.float32(1) / np.float32(self.theta) ** exponents
        if self.rope_type == "linear":
            frequencies /= np.float32(self.factor)
        elif self.rope_type == "llama3":
            frequencies = self._stretch_long_waves(frequencies)
        return frequencies

    def _stretch_long_waves(self, frequencies: FloatArray) -> FloatArray:
        waves_in_context = self.original_max_positions * frequencies / np.float32(2 * math.pi)
        # 1 above high_freq_factor waves (untouched), 0 below low_freq_factor (fully stretched).
        sharpness = (waves_in_context - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        sharpness = np.clip(sharpness, 0, 1)
        kept = sharpness + (1 - sharpness) / self.factor
        stretched: FloatArray = (kept * frequencies).astype(np.float32)
        return stretched

    def angles(self, num_positions: int) -> FloatArray:
        """Per position cosines [head_dim / 2], then sines: [num_positions, head_dim]."""
        positions = np.arange(num_positions, dtype=np.float32)
        radians = np.outer(positions, self.inverse_frequencies())
        return np.concatenate([np.cos(radians), np.sin(radians)], axis=1)


def parse_rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Read rope_parameters, or the older rope_theta and rope_scaling.

    Raises UnsupportedModelError for other types than default, linear and llama3, and for partial
    rotation.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModelError(f"config.json: RoPE parameters are {scaling!r}, not an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"config.json: RoPE type {rope_type!r} is not supported")
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError("config.json: partial_rotary_factor is not supported")
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    is_llama3 = rope_type == "llama3"
    return RopeConfig(
        head_dim=head_dim,
        theta=_number(theta, "rope_theta"),
        rope_type=cast(RopeType, rope_type),
        factor=1.0 if rope_type == "default" else _number(scaling.get("factor"), "factor"),
        low_freq_factor=_llama3(scaling, "low_freq_factor") if is_llama3 else 1.0,
        high_freq_factor=_llama3(scaling, "high_freq_factor") if is_llama3 else 4.0,
        original_max_positions=int(_llama3(scaling, "original_max_position_embeddings"))
        if is_llama3
        else 8192,
    )


def _llama3(scaling: Mapping[str, Any], key: str) -> float:
    return _number(scaling.get(key), key)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UnsupportedModelError(f"config.json: RoPE {key} must be positive, it is {value!r}")
    return float(value)

"""The matrix products of one decode step and nothing else: what plain torch sets as a bound."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

import torch
from torch.nn.functional import linear

_NUM_REPEATS: Final = 15


class GemmStep:
    """Random float32 weights of a model's shape, distinct in every layer as in the model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is a Hugging Face config.json of the Llama family."""
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // num_heads
        shapes = [  # [out, in]: qkv, o, gate_up, down
            ((num_heads + 2 * num_kv_heads) * head_dim, hidden),
            (hidden, num_heads * head_dim),
            (2 * intermediate, hidden),
            (hidden, intermediate),
        ]
        layers = shapes * config["num_hidden_layers"]
        self._weights = [torch.randn(shape) for shape in [*layers, (config["vocab_size"], hidden)]]

    def seconds(self, num_rows: int) -> float:
        """Median time of all products of a step with one token for each of `num_rows` rows."""
        widths = {weight.shape[1] for weight in self._weights}
        inputs = {width: torch.randn(num_rows, width) for width in widths}
        times = []
        for _ in range(_NUM_REPEATS):
            start_s = time.perf_counter()
            for weight in self._weights:
                linear(inputs[weight.shape[1]], weight)
            times.append(time.perf_counter() - start_s)
        return median(times[_NUM_REPEATS // 5 :])

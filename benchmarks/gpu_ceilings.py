"""What one GPU can do at most: `python -m benchmarks.gpu_ceilings MODEL ...`, JSON on stdout.

Bandwidth of reading and of copying, one large matrix product, and the products of whole decoder
steps of each MODEL through torch, captured in one graph, with distinct weights for every layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.dummy_models import SHAPES
from benchmarks.gpu_timing import copy_ceiling, graph_us, read_ceiling
from cupy_kernels.device import Device
from cupy_kernels.errors import KernelError

_ROWS: Final = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
_MAX_SAMPLED_ROWS: Final = 512
_SQUARE: Final = 8192


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def _square_tflops() -> float:
    a, b = _random(_SQUARE, _SQUARE), _random(_SQUARE, _SQUARE)
    out = torch.empty_like(a)
    return 2 * _SQUARE**3 / graph_us([lambda: torch.mm(a, b, out=out)] * 10) / 1e6


def _read_bytes_per_s() -> float | None:
    """None where the kernel cannot run; the reason goes to stderr."""
    try:
        return read_ceiling(Device.open())
    except KernelError as error:
        print(f"no read ceiling: {error}", file=sys.stderr)
        return None


def _layer_sizes(name: str) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's four products."""
    shape = SHAPES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape["head_dim"]
    return [
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    ]


def step_ms(name: str) -> dict[int, float]:
    """Rows -> the products of one step [ms]; logits are of 512 rows at most."""
    sizes = _layer_sizes(name)
    num_layers: int = SHAPES[name]["num_hidden_layers"]
    layers = [[_random(*size) for size in sizes] for _ in range(num_layers)]
    head = _random(SHAPES[name]["vocab_size"], SHAPES[name]["hidden_size"])
    return {rows: graph_us([_step(layers, head, rows)]) / 1e3 for rows in _ROWS}


def _step(layers: list[list[torch.Tensor]], head: torch.Tensor, rows: int) -> Callable[[], None]:
    inputs = [_random(rows, weight.shape[1]) for weight in layers[0]]
    outputs = [_random(rows, weight.shape[0]) for weight in layers[0]]
    num_sampled = min(rows, _MAX_SAMPLED_ROWS)
    logits = _random(num_sampled, head.shape[0])

    def run() -> None:
        for layer in layers:
            for source, weight, target in zip(inputs, layer, outputs, strict=True):
                torch.mm(source, weight.t(), out=target)
        torch.mm(inputs[0][:num_sampled], head.t(), out=logits)

    return run


def main() -> int:
    """Measure and print; exit code 2 without a GPU."""
    if not torch.cuda.is_available():
        print("cannot run: torch sees no GPU", file=sys.stderr)
        return 2
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "copy_bytes_per_s": copy_ceiling(),
        "read_bytes_per_s": _read_bytes_per_s(),
        "square_tflops": _square_tflops(),
        "step_ms": {},
    }
    for name in sys.argv[1:]:
        found["step_ms"][name] = step_ms(name)
        torch.cuda.empty_cache()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

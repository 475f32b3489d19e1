"""What the kernels do not do, told before anything is loaded."""

from __future__ import annotations

from typing import Final

from cupy_kernels.decode import MAX_ROWS
from cupy_kernels.errors import UnsupportedShapeError
from cupy_kernels.glue import MAX_HIDDEN
from executor_svc.model.config import ModelConfig

MAX_BATCHED_TOKENS: Final = 1 << 18
"""More would leave no room for the rest of what the host says of a step."""

_VECTOR: Final = 8  # elements in 16 bytes, which kernels read at once


def check_sizes(config: ModelConfig, max_rows: int, max_num_batched_tokens: int) -> None:
    """Raise UnsupportedShapeError for a model, or for steps, that the GPU's kernels do not take.

    What attention takes is checked by cupy_kernels.shape.AttentionShape.
    """
    for flag, size, most in (
        ("--max-num-seqs", max_rows, MAX_ROWS),
        ("--max-num-batched-tokens", max_num_batched_tokens, MAX_BATCHED_TOKENS),
    ):
        if size > most:
            raise UnsupportedShapeError(f"{flag} {size}: at most {most} on a GPU; choose less")
    if config.hidden_size % _VECTOR or config.hidden_size > MAX_HIDDEN:
        raise _not_served(f"hidden_size {config.hidden_size}", f", at most {MAX_HIDDEN}")
    if config.intermediate_size % _VECTOR:
        raise _not_served(f"intermediate_size {config.intermediate_size}", "")


def _not_served(what: str, limit: str) -> UnsupportedShapeError:
    return UnsupportedShapeError(
        f"config.json: {what}: the GPU kernels need a multiple of {_VECTOR}{limit}; serve this "
        "model with --device cpu"
    )

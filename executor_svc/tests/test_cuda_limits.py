"""What the GPU's kernels do not take is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_kernels.errors import UnsupportedShapeError
from executor_svc.backends.cuda.limits import MAX_BATCHED_TOKENS, check_sizes
from executor_svc.tests.models import parsed


@pytest.mark.parametrize(
    ("changes", "max_rows", "max_tokens", "message"),
    [
        ({}, 2049, 8192, r"^--max-num-seqs 2049: at most 2048 on a GPU; choose less$"),
        ({}, 512, MAX_BATCHED_TOKENS + 1, r"^--max-num-batched-tokens 262145: at most 262144"),
        ({"hidden_size": 100}, 512, 8192, r"hidden_size 100: .* multiple of 8, at most 16384"),
        ({"hidden_size": 16392}, 512, 8192, r"hidden_size 16392: .*--device cpu$"),
        ({"intermediate_size": 1004}, 512, 8192, r"intermediate_size 1004: .* multiple of 8;"),
    ],
)
def test_the_message_says_what_and_what_to_change(
    changes: dict[str, Any], max_rows: int, max_tokens: int, message: str
) -> None:
    with pytest.raises(UnsupportedShapeError, match=message):
        check_sizes(parsed(**changes), max_rows, max_tokens)


def test_what_is_just_in_bounds_is_taken() -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 53248}
    check_sizes(parsed(**sizes), 2048, MAX_BATCHED_TOKENS)

"""How a step's new tokens are cut into items."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_kernels.prefill import prefill_items
from cupy_kernels.shape import AttentionShape


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_items_cover_every_token_once(head_dim: int, group: int) -> None:
    rng = np.random.default_rng(group)
    shape = AttentionShape(1, 8 * group, 8, head_dim, 16)
    for _ in range(20):
        count = int(rng.integers(1, 20))
        new = rng.integers(1, 500, count).astype(np.int32)
        computed = rng.integers(0, 500, count).astype(np.int32)
        rows = rng.permutation(30)[:count].astype(np.int32)
        items = prefill_items(shape, rows, new, computed)
        tokens = np.concatenate([np.arange(first, first + n) for _, first, n, _ in items])
        assert sorted(tokens) == list(range(new.sum()))
        starts = dict(zip(rows.tolist(), (np.cumsum(new) - new).tolist(), strict=True))
        before = dict(zip(rows.tolist(), computed.tolist(), strict=True))
        for row, first, _, position in items.tolist():
            assert position == before[row] + first - starts[row]
        assert (items[:, 2] * group <= (64 if head_dim == 256 else 128)).all()
        ends = items[:, 2] + items[:, 3]
        assert (np.diff(ends) <= 0).all()

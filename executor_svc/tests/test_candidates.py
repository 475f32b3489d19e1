"""The GPU's ranking of candidates, on the CPU: it is plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from executor_svc.backends.cuda.candidates import Ranker, ranked_width

VOCAB = 5003


def random_logits(num_rows: int, seed: int) -> Tensor:
    """[num_rows, VOCAB] bfloat16 in rows of 5,008, with many ties, 0 and -0 among the highest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, 5008, generator=generator).bfloat16()
    logits[::2] -= 4  # few are above 0 in every other row
    logits[:, 100:160:3] = -0.0
    logits[:, 101:160:3] = 0.0
    logits[:, VOCAB:] = torch.nan
    return logits[:, :VOCAB]


def check_ranked(logits: Tensor, count: int, device: torch.device) -> None:
    """Every second row, and the last one, against a stable sort in float64."""
    num_rows = len(logits)
    rows = torch.tensor([*range(0, num_rows, 2), num_rows - 1], dtype=torch.int32)
    drawn = torch.arange(num_rows, dtype=torch.int32) * 37 % VOCAB
    out = torch.full((len(rows) + 1, ranked_width(count)), 7.0, device=device)
    ranker = Ranker(VOCAB, logits.dtype, device)
    for _ in range(2):  # its memory is used again
        ranker.rank(logits.to(device), rows.to(device), drawn.to(device), out[:-1])
    assert out[-1].eq(7).all()
    values, picked = out[:-1].cpu(), logits[rows.long()].double()
    order = picked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(values[:, :count].view(torch.int32).long(), order)
    logprobs = picked.log_softmax(dim=1)
    ids = torch.cat([order, drawn[rows.long()].long()[:, None]], dim=1)
    expected = logprobs.gather(1, ids)
    torch.testing.assert_close(values[:, count:].double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("count", [1, 16, 64])
def test_best_first_and_equals_in_id_order(num_rows: int, count: int) -> None:
    check_ranked(random_logits(num_rows, seed=count), count, torch.device("cpu"))


def test_minus_zero_equals_zero() -> None:
    logits = torch.full((1, VOCAB), -1.0).bfloat16()
    logits[0, [5, 9, 700]] = torch.tensor([-0.0, 0.0, -0.0]).bfloat16()
    out = torch.empty(1, ranked_width(3))
    row = torch.zeros(1, dtype=torch.int32)
    Ranker(VOCAB, logits.dtype, torch.device("cpu")).rank(logits, row, row, out)
    assert out[0, :3].numpy().view(np.int32).tolist() == [5, 9, 700]


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone() -> None:
    logits = random_logits(3, seed=1)
    rows, drawn = torch.arange(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    ranker = Ranker(VOCAB, logits.dtype, torch.device("cpu"))
    clean, dirty = torch.empty(2, 3, ranked_width(8))
    ranker.rank(logits, rows, drawn, clean)
    logits[1, 7] = torch.nan
    ranker.rank(logits, rows, drawn, dirty)
    assert torch.equal(clean[::2].view(torch.int32), dirty[::2].view(torch.int32))

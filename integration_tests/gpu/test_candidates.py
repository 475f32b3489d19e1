"""Candidates on the device: order, ties, log-probabilities; and memory that no step allocates."""

from __future__ import annotations

import pytest
import torch

from executor_svc.backends.cuda.candidates import Ranker
from executor_svc.tests.test_candidates import check_ranked, random_logits


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("count", [1, 16, 64])
def test_best_first_and_equals_in_id_order(num_rows: int, count: int) -> None:
    logits = random_logits(num_rows, seed=count)
    check_ranked(logits, count, torch.device("cuda"))


def test_nothing_of_the_logits_size_is_allocated() -> None:
    device = torch.device("cuda")
    vocab = 128_256
    ranker = Ranker(vocab, torch.bfloat16, device)
    logits = torch.randn(40, vocab, device=device).bfloat16()
    rows = torch.arange(40, dtype=torch.int32, device=device)
    drawn, out = torch.zeros_like(rows), torch.empty(40, 2 * 64 + 1, device=device)
    ranker.rank(logits, rows, drawn, out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ranker.rank(logits, rows, drawn, out)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < logits[:16].nbytes

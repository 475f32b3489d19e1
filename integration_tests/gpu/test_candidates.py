"""Candidates on the device: order, ties, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from executor_svc.backends.cuda.candidates import rank


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("count", [1, 16, 64])
def test_best_first_and_equals_in_id_order(num_rows: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    # 16 bits leave many ties among 5,000.
    logits = torch.randn(num_rows, 5000, generator=generator).bfloat16()
    drawn = torch.randint(5000, (num_rows,), generator=generator, dtype=torch.int32)
    values = rank(logits.cuda(), drawn.cuda(), count).cpu()
    order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :count]
    logprobs = logits.double().log_softmax(dim=1)
    assert torch.equal(values[:, :count].view(torch.int32).long(), order)
    expected = torch.cat([logprobs.gather(1, order), logprobs.gather(1, drawn.long()[:, None])], 1)
    torch.testing.assert_close(values[:, count:].double(), expected, atol=1e-4, rtol=1e-5)

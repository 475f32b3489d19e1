"""The likeliest tokens of rows that ask for them, on the device."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_ROWS_AT_ONCE: Final = 32
"""Bounds the memory of the keys, 8 bytes a logit."""
_LOWEST_ID: Final = 0xFFFFFFFF


def rank(logits: Tensor, token_ids: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens of each row, best first, equals in id order.

    Args:
        logits: [n, vocab_size].
        token_ids: [n] int32, what was drawn.
        count: at most vocab_size.

    Returns:
        [n, 2 * count + 1] float32: bits of the int32 ids, their log-probabilities, and that of the
        token drawn. A row with NaN or Inf holds nothing of use.
    """
    columns = (logits.split(_ROWS_AT_ONCE), token_ids.split(_ROWS_AT_ONCE))  # type: ignore[no-untyped-call]
    return torch.cat([_rank(*part, count) for part in zip(*columns, strict=True)])


def _rank(logits: Tensor, token_ids: Tensor, count: int) -> Tensor:
    scores = logits.float()
    # Integers of the same order, then the id reversed: one key sorts by both.
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered << 32) | (_LOWEST_ID - ids)
    best = keys.topk(count, dim=1).values
    best_ids = _LOWEST_ID - (best & _LOWEST_ID)
    log_total = scores.logsumexp(dim=1, keepdim=True)
    drawn = scores.gather(1, token_ids.long()[:, None])
    logprobs = torch.cat([scores.gather(1, best_ids), drawn], dim=1) - log_total
    return torch.cat([best_ids.int().view(torch.float32), logprobs], dim=1)

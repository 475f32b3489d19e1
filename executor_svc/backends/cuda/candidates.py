"""The likeliest tokens of rows that ask for them, on the device."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_svc.plan_check import MAX_CANDIDATES

_ROWS_AT_ONCE: Final = 16
"""Bounds the memory, 18 bytes a logit."""
_LOWEST_ID: Final = 0xFFFFFFFF


def ranked_width(count: int) -> int:
    """Numbers in a ranked row: `count` ids, as many log-probabilities, that of the token drawn."""
    return 2 * count + 1


class Ranker:
    """Ranks rows of logits in memory of its own, so that a step allocates none of their size."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate for logits of a type."""
        size = (_ROWS_AT_ONCE, vocab_size)
        self._logits = torch.empty(size, dtype=dtype, device=device)
        self._scores = torch.empty(size, dtype=torch.float32, device=device)
        self._ordered = torch.empty(size, dtype=torch.int32, device=device)
        self._keys = torch.empty(size, dtype=torch.int64, device=device)
        ids = torch.arange(vocab_size, dtype=torch.int64, device=device)
        self._reversed_ids = _LOWEST_ID - ids  # [vocab_size]
        num_best = _ROWS_AT_ONCE * (MAX_CANDIDATES + 1)
        self._best = torch.empty(num_best, dtype=torch.int64, device=device)
        self._places = torch.empty(num_best, dtype=torch.int64, device=device)
        self._wanted = torch.empty(num_best, dtype=torch.int64, device=device)
        self._values = torch.empty(num_best, dtype=torch.float32, device=device)
        self._drawn = torch.empty(_ROWS_AT_ONCE, dtype=torch.int32, device=device)
        self._highest = torch.empty(_ROWS_AT_ONCE, 1, dtype=torch.float32, device=device)
        self._totals = torch.empty(_ROWS_AT_ONCE, 1, dtype=torch.float32, device=device)

    def rank(self, logits: Tensor, rows: Tensor, token_ids: Tensor, out: Tensor) -> None:
        """Enqueue on the current stream: the likeliest tokens, best first, equals in id order.

        Args:
            logits: [n, vocab_size]; -0 equals 0.
            rows: [m] int32, which of them.
            token_ids: [>= n] int32, what was drawn from each.
            out: [m, ranked_width(count)] float32, written: bits of the int32 ids, their
                log-probabilities, and that of the token drawn; count is 1 to MAX_CANDIDATES and at
                most vocab_size. A row with NaN or Inf holds nothing of use.
        """
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            self._rank(logits, rows[part], token_ids, out[part])

    def _rank(self, logits: Tensor, rows: Tensor, token_ids: Tensor, out: Tensor) -> None:
        size, count = len(rows), out.shape[1] // 2
        scores = self._scores[:size]
        scores.copy_(torch.index_select(logits, 0, rows, out=self._logits[:size]))
        scores.add_(0.0)  # -0 becomes 0
        places = _matrix(self._places, size, count)
        torch.topk(self._sort_keys(scores), count, out=(_matrix(self._best, size, count), places))
        wanted = _matrix(self._wanted, size, count + 1)
        wanted[:, :count].copy_(places)
        wanted[:, count].copy_(torch.index_select(token_ids, 0, rows, out=self._drawn[:size]))
        values = torch.gather(scores, 1, wanted, out=_matrix(self._values, size, count + 1))
        highest, totals = self._highest[:size], self._totals[:size]
        highest.copy_(values[:, :1])
        scores.sub_(highest).exp_()
        torch.sum(scores, dim=1, keepdim=True, out=totals)
        out[:, :count].view(torch.int32).copy_(places)
        out[:, count:].copy_(values.sub_(highest).sub_(totals.log_()))

    def _sort_keys(self, scores: Tensor) -> Tensor:
        """Integers in the order of scores [m, vocab_size], the lower id greater among equals."""
        bits, ordered = scores.view(torch.int32), self._ordered[: len(scores)]
        torch.bitwise_right_shift(bits, 31, out=ordered)
        ordered.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
        keys = self._keys[: len(scores)].copy_(ordered)
        return keys.bitwise_left_shift_(32).bitwise_or_(self._reversed_ids)


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The begin of a vector as [rows, columns]."""
    return memory[: rows * columns].view(rows, columns)

"""Small plans for the tests of the executor's service side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb


def new_rows(*rows: dict[str, Any]) -> pb.NewRows:
    """Rows as dicts: row, tokens, blocks; optional computed, and any parallel column's name."""
    message = pb.NewRows()
    token_ids: list[int] = []
    block_ids: list[int] = []
    for row in rows:
        fields = dict(row)
        tokens, blocks = fields.pop("tokens"), fields.pop("blocks")
        computed = fields.pop("computed", 0)
        has_history = fields.get("flags", 0) & pb.ROW_FLAG_HISTORY
        token_ids += tokens if has_history else tokens[computed:]
        block_ids += blocks
        message.rows.append(fields.pop("row"))
        message.num_computed_tokens.append(computed)
        message.num_tokens.append(len(tokens))
        message.num_prompt_tokens.append(fields.pop("num_prompt_tokens", len(tokens)))
        message.block_counts.append(len(blocks))
        for name in _OPTIONAL:
            getattr(message, name).append(fields.pop(name, 0))
        assert not fields, fields
    message.token_ids = pack_u32(token_ids)
    message.block_ids = pack_u32(block_ids)
    return message


_OPTIONAL = (
    "request_keys",
    "branches",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seeds",
    "flags",
    "num_candidates",
    "logits_from",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def batch(*rows: tuple[int, int], num_decode_rows: int = 0) -> pb.Batch:
    """A batch of (row, number of scheduled tokens)."""
    return pb.Batch(
        rows=[row for row, _ in rows],
        num_scheduled_tokens=[count for _, count in rows],
        num_decode_rows=num_decode_rows,
    )


def appends(*rows: tuple[int, Sequence[int]]) -> pb.BlockAppends:
    """Appends of (row, block ids)."""
    return pb.BlockAppends(
        rows=[row for row, _ in rows],
        counts=[len(ids) for _, ids in rows],
        block_ids=[block_id for _, ids in rows for block_id in ids],
    )


def prefill(
    step_id: int, epoch: int, row: int, tokens: list[int], blocks: list[int]
) -> pb.StepPlan:
    """A plan that begins one greedy row and computes all of its tokens."""
    return pb.StepPlan(
        epoch=epoch,
        step_id=step_id,
        new_rows=new_rows({"row": row, "tokens": tokens, "blocks": blocks}),
        batch=batch((row, len(tokens))),
    )


def decode_same(step_id: int, epoch: int) -> pb.StepPlan:
    """A plan that repeats the batch."""
    return pb.StepPlan(epoch=epoch, step_id=step_id, batch=pb.Batch(same=True))

"""Decoding: columns to arrays, defaults of empty columns, malformed lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import PlanError, decode
from executor_svc.tests.plans import appends, batch, new_rows


def test_an_empty_plan_has_empty_columns() -> None:
    plan = decode(pb.StepPlan(epoch=7, step_id=3))
    assert (plan.epoch, plan.step_id) == (7, 3)
    assert plan.swap_out.src.size == plan.copy.dst.size == plan.freed_rows.size == 0
    assert plan.new_rows.rows.size == plan.new_rows.token_ids.size == plan.batch_rows.size == 0
    assert not plan.same_batch


def test_all_columns_come_through() -> None:
    message = pb.StepPlan(
        swap_out=pb.BlockPairs(src=[1, 2], dst=[0, 3]),
        copy=pb.BlockPairs(src=[4], dst=[5]),
        swap_in=pb.BlockPairs(src=[1], dst=[6]),
        freed_rows=[9, 8],
        forks=pb.Forks(src_rows=[1], dst_rows=[2], tail_dst_block_ids=[11]),
        appends=appends((3, [21, 22]), (4, [23])),
        inputs=pb.Inputs(rows=[1, 2], token_ids=[100, 0]),
        batch=batch((1, 1), (5, 7), num_decode_rows=1),
    )
    plan = decode(message)
    assert plan.swap_out.src.tolist() == [1, 2]
    assert plan.swap_out.dst.tolist() == [0, 3]
    assert (plan.copy.src[0], plan.copy.dst[0]) == (4, 5)
    assert (plan.swap_in.src[0], plan.swap_in.dst[0]) == (1, 6)
    assert plan.freed_rows.tolist() == [9, 8]
    forks = (plan.fork_src_rows, plan.fork_dst_rows, plan.fork_tail_dst_block_ids)
    assert [column.tolist() for column in forks] == [[1], [2], [11]]
    assert plan.append_rows.tolist() == [3, 4]
    assert plan.append_counts.tolist() == [2, 1]
    assert plan.append_block_ids.tolist() == [21, 22, 23]
    assert plan.input_token_ids.tolist() == [100, 0]
    assert plan.batch_rows.tolist() == [1, 5]
    assert plan.num_scheduled_tokens.tolist() == [1, 7]
    assert plan.num_decode_rows == 1


def test_empty_parallel_columns_expand() -> None:
    message = pb.StepPlan(
        forks=pb.Forks(src_rows=[1, 2], dst_rows=[3, 4]),
        appends=pb.BlockAppends(rows=[1, 2], block_ids=[7, 8]),
        inputs=pb.Inputs(rows=[1, 2]),
        batch=pb.Batch(rows=[1, 2, 3]),
        new_rows=pb.NewRows(
            rows=[5, 6], num_tokens=[1, 2], token_ids=pack_u32([10, 11, 12]), seeds=[2**64 - 1, 1]
        ),
    )
    plan = decode(message)
    assert plan.fork_tail_dst_block_ids.tolist() == [0, 0]
    assert plan.append_counts.tolist() == [1, 1]
    assert plan.input_token_ids.tolist() == [0, 0]
    assert plan.num_scheduled_tokens.tolist() == [1, 1, 1]
    assert plan.new_rows.temperature.dtype == np.float32
    assert plan.new_rows.temperature.tolist() == [0.0, 0.0]
    assert plan.new_rows.seeds.tolist() == [2**64 - 1, 1]


def test_rows_send_what_they_must() -> None:
    rows = new_rows(
        {"row": 1, "tokens": [5, 6, 7], "blocks": [1], "computed": 2},
        {"row": 2, "tokens": [8, 9], "blocks": [2], "computed": 1, "flags": pb.ROW_FLAG_HISTORY},
    )
    decoded = decode(pb.StepPlan(new_rows=rows)).new_rows
    assert decoded.token_ids.tolist() == [7, 8, 9]
    assert decoded.first_sent_token.tolist() == [2, 0]
    assert decoded.num_sent_tokens.tolist() == [1, 2]


def _rows(**columns: object) -> pb.StepPlan:
    fields: dict[str, object] = {
        "rows": [1],
        "num_tokens": [2],
        "token_ids": pack_u32([3, 4]),
        "block_counts": [1],
        "block_ids": pack_u32([5]),
    }
    return pb.StepPlan(new_rows=pb.NewRows(**{**fields, **columns}))  # type: ignore[arg-type]  # by name


MALFORMED: dict[str, Callable[[], pb.StepPlan]] = {
    "swap_out.dst": lambda: pb.StepPlan(swap_out=pb.BlockPairs(src=[1, 2], dst=[1])),
    "copy.dst": lambda: pb.StepPlan(copy=pb.BlockPairs(src=[1])),
    "swap_in.dst": lambda: pb.StepPlan(swap_in=pb.BlockPairs(dst=[1])),
    "forks.dst_rows": lambda: pb.StepPlan(forks=pb.Forks(src_rows=[1])),
    "forks.tail": lambda: pb.StepPlan(
        forks=pb.Forks(src_rows=[1], dst_rows=[2], tail_dst_block_ids=[1, 2])
    ),
    "appends.counts": lambda: pb.StepPlan(
        appends=pb.BlockAppends(rows=[1, 2], counts=[1], block_ids=[1, 2])
    ),
    "appends.block_ids": lambda: pb.StepPlan(appends=pb.BlockAppends(rows=[1], block_ids=[1, 2])),
    "inputs.token_ids": lambda: pb.StepPlan(inputs=pb.Inputs(rows=[1, 2], token_ids=[1])),
    "batch.num_scheduled_tokens": lambda: pb.StepPlan(
        batch=pb.Batch(rows=[1], num_scheduled_tokens=[1, 1])
    ),
    "batch: `same`": lambda: pb.StepPlan(batch=pb.Batch(same=True, rows=[1])),
    "new_rows.seeds": lambda: _rows(seeds=[1, 2]),
    "new_rows.temperature": lambda: _rows(temperature=[1.0, 0.5]),
    "not whole uint32": lambda: _rows(token_ids=b"\1\2\3\4\5"),
    "new_rows.block_ids": lambda: _rows(block_ids=pack_u32([1, 2])),
    "new_rows.token_ids": lambda: _rows(token_ids=pack_u32([1])),
    "new_rows.num_computed_tokens": lambda: _rows(num_computed_tokens=[3]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_columns_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match=name):
        decode(MALFORMED[name]())


def test_sums_do_not_wrap() -> None:
    huge = pb.BlockAppends(rows=[1, 2], counts=[2**32 - 1, 2], block_ids=[1])
    with pytest.raises(PlanError, match=r"appends\.block_ids"):
        decode(pb.StepPlan(appends=huge))

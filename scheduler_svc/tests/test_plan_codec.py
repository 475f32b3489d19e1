import numpy as np

from blockyard.common.columns import unpack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc import plan_codec
from scheduler_svc.request import Request, Sampling
from scheduler_svc.step_plan import NewRow, StepPlan


def test_steady_decode_is_a_few_bytes() -> None:
    plan = StepPlan(7, 3, rows=np.arange(256), num_decode_rows=256, same_batch=True)
    assert len(plan_codec.encode(plan).SerializeToString()) <= 16


def test_new_rows_become_parallel_columns() -> None:
    requests = [
        Request(
            key=key,
            frontend=0,
            request_id=key,
            token_ids=np.arange(key, dtype=np.int32),
            num_prompt_tokens=key,
            max_total_tokens=99,
            arrival_ns=0,
            sampling=Sampling(temperature=0.5 * (key - 3), top_k=key, seed=2**63 + key),
        )
        for key in (3, 5)
    ]
    plan = StepPlan(1, 1, rows=np.array([4, 9]), num_scheduled_tokens=[2, 5])
    for row, request in zip((4, 9), requests, strict=True):
        blocks = np.array([row + 1, row + 2], np.int32)[: 2 if row == 9 else 1]
        plan.new_rows.append(NewRow(row, request, 0, request.token_ids, blocks))
    message = plan_codec.encode(plan)
    new = message.new_rows
    assert list(new.rows) == [4, 9]
    assert list(new.num_tokens) == [3, 5]
    assert unpack_u32(new.token_ids).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert list(new.block_counts) == [1, 2]
    assert unpack_u32(new.block_ids).tolist() == [5, 10, 11]
    assert list(new.temperature) == [0.0, 1.0]
    assert list(new.seeds) == [2**63 + 3, 2**63 + 5]
    assert not new.num_computed_tokens
    assert list(message.batch.num_scheduled_tokens) == [2, 5]


def test_decode_keeps_order_and_failures() -> None:
    result = plan_codec.decode(
        pb.StepResult(epoch=1, step_id=2, token_ids=[5, 4, 9], failed_rows=[3], failed_status=[1])
    )
    assert result.token_ids.tolist() == [5, 4, 9]
    assert result.failed_rows == {3}

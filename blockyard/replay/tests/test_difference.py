from __future__ import annotations

import pytest

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.replay.difference import Difference, Steps, compare

PLAN = pb.StepPlan(
    epoch=3,
    step_id=4,
    freed_rows=[1, 2],
    batch=pb.Batch(rows=[5, 6, 7], num_decode_rows=3),
    new_rows=pb.NewRows(rows=[9], token_ids=pack_u32([10, 11]), temperature=[0.5]),
)


def changed(**fields: object) -> pb.StepPlan:
    plan = pb.StepPlan()
    plan.CopyFrom(PLAN)
    for name, value in fields.items():
        plan.ClearField(name)  # type: ignore[arg-type]  # one of the plan's
        plan.MergeFrom(pb.StepPlan(**{name: value}))  # type: ignore[arg-type]
    return plan


def test_equal_messages_have_no_difference() -> None:
    assert list(compare(PLAN, changed())) == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (changed(step_id=5), "step_id: 4 recorded, 5 now"),
        (changed(freed_rows=[1, 3]), "freed_rows[1]: 2 recorded, 3 now"),
        (
            changed(freed_rows=[1]),
            "freed_rows[1]: 2 recorded, nothing now (of 2 recorded, 1 now)",
        ),
        (
            changed(freed_rows=[0, 1, 2]),
            "freed_rows[0]: 1 recorded, 0 now (of 2 recorded, 3 now)",
        ),
        (
            changed(batch=pb.Batch(rows=[5, 6, 8], num_decode_rows=3)),
            "batch.rows[2]: 7 recorded, 8 now",
        ),
        (
            changed(new_rows=pb.NewRows(rows=[9], token_ids=pack_u32([10, 12]), temperature=[0.5])),
            "new_rows.token_ids[1]: 11 recorded, 12 now",
        ),
        (changed(swap_in=pb.BlockPairs()), "swap_in: not set recorded, set now"),
    ],
)
def test_each_kind_of_field(now: pb.StepPlan, line: str) -> None:
    assert list(compare(PLAN, now)) == [line]


def test_every_column_that_differs_is_told() -> None:
    now = changed(epoch=8, batch=pb.Batch(rows=[5, 6], num_decode_rows=2))
    assert [line.split(":")[0] for line in compare(PLAN, now)] == [
        "epoch",
        "batch.rows[2]",
        "batch.num_decode_rows",
    ]


def test_a_difference_for_people() -> None:
    found = Difference(12, 3, 4, ["a", "b"])
    assert str(found) == "step 12 (epoch 3, step_id 4)\n  a\n  b"


def test_steps() -> None:
    assert not Steps().are_over(10**9)
    assert [Steps(1, 3).are_over(count) for count in (0, 2, 3, 4)] == [False, False, True, True]

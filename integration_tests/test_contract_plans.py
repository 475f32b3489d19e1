"""The wire contract, plan by plan: order, atomicity, moves, forks. The scheduler is the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from executor_svc.tests.plans import appends, batch, new_rows
from integration_tests.harness import executor_in_process
from integration_tests.reference import SamplingParams, reference_output
from integration_tests.step_stream import StepStream

INFO: Final = fake_info(32, 8, block_size=4, max_rows=6, max_model_len=40)
PROMPT: Final = [3, 1, 4, 1, 5, 9]
OTHER: Final = [2, 7, 1, 8, 2, 8, 1]
EXPECTED: Final = reference_output(PROMPT, 30, INFO.vocab_size)
STEP_S: Final = 0.005


def after(*token_ids: int) -> int:
    """The token that follows a sequence."""
    return reference_output(token_ids, 1, INFO.vocab_size)[0]


def begin(row: int, tokens: list[int], blocks: list[int], **fields: Any) -> pb.StepPlan:
    """A plan that begins a row and computes all of it."""
    new = new_rows({"row": row, "tokens": tokens, "blocks": blocks, **fields})
    return pb.StepPlan(new_rows=new, batch=batch((row, len(tokens))))


def decode(*rows: int, **fields: Any) -> pb.StepPlan:
    """A plan that runs these rows, one token each."""
    return pb.StepPlan(batch=pb.Batch(rows=rows, num_decode_rows=len(rows)), **fields)


@pytest_asyncio.fixture
async def stream(tmp_path: Path) -> AsyncIterator[StepStream]:
    """An open stream to an executor whose steps take a while, so that plans queue up."""
    address = f"unix:{tmp_path}/executor.sock"
    runner = FakeRunner(INFO, FakeOptions(step_s=STEP_S, nan_seeds={666}))
    async with executor_in_process(runner, address), StepStream(address) as stream:
        await stream.open()
        yield stream


async def test_a_freed_block_is_reused_by_the_very_next_plan(stream: StepStream) -> None:
    await stream.send(1, begin(0, PROMPT, [1, 2]))
    await stream.send(2, decode(0))
    plan = begin(1, OTHER, [2, 1])
    plan.freed_rows.append(0)
    await stream.send(3, plan)
    assert [await stream.tokens(1), await stream.tokens(2)] == [EXPECTED[:1], EXPECTED[1:2]]
    assert await stream.tokens(3) == [after(*OTHER)]


async def test_a_row_is_freed_and_begun_by_the_same_plan(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    plan = begin(0, OTHER, [1, 2])
    plan.freed_rows.append(0)
    assert await stream.run(2, plan) == [after(*OTHER)]


async def test_rows_of_one_plan_may_share_a_prefix_that_it_computes(stream: StepStream) -> None:
    prefix, tail = PROMPT[:4], [17, 18]
    rows = new_rows(
        {"row": 0, "tokens": prefix + PROMPT[4:], "blocks": [1, 2]},
        {"row": 1, "tokens": prefix + tail, "blocks": [1, 3], "computed": 4},
    )
    plan = pb.StepPlan(new_rows=rows, batch=batch((0, 6), (1, 2)))
    assert await stream.run(1, plan) == [EXPECTED[0], after(*prefix, *tail)]


async def test_an_empty_plan_frees_rows(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    assert await stream.run(2, pb.StepPlan(freed_rows=[0])) == []
    rejected = await stream.rejected(3, decode(0))
    assert "not live" in rejected.reason
    assert await stream.run(3, begin(0, OTHER, [1, 2])) == [after(*OTHER)]


async def test_three_plans_may_queue_and_results_come_in_order(stream: StepStream) -> None:
    await stream.send(1, begin(0, PROMPT, [1, 2, 3]))
    await stream.send(2, decode(0))
    await stream.send(3, pb.StepPlan(batch=pb.Batch(same=True)))
    assert [await stream.tokens(i) for i in (1, 2, 3)] == [[t] for t in EXPECTED[:3]]


async def test_chunks_and_appends_make_the_same_output(stream: StepStream) -> None:
    new = new_rows({"row": 0, "tokens": PROMPT, "blocks": [5]})
    assert await stream.run(1, pb.StepPlan(new_rows=new, batch=batch((0, 3)))) == []
    second = pb.StepPlan(appends=appends((0, [9, 3])), batch=batch((0, 3)))
    assert await stream.run(2, second) == [EXPECTED[0]]
    for step_id in range(3, 9):
        assert await stream.run(step_id, decode(0)) == [EXPECTED[step_id - 2]]


async def test_swapped_blocks_come_back_elsewhere(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    out = pb.StepPlan(swap_out=pb.BlockPairs(src=[1, 2], dst=[5, 0]), freed_rows=[0])
    await stream.run(2, out)
    await stream.run(3, begin(1, OTHER, [1, 2]))  # overwrites what was swapped out
    known = [*PROMPT, EXPECTED[0]]
    back = pb.StepPlan(
        swap_in=pb.BlockPairs(src=[0, 5], dst=[8, 7]),
        new_rows=new_rows({"row": 0, "tokens": known, "blocks": [7, 8], "computed": 6}),
        batch=batch((0, 1)),
    )
    assert await stream.run(4, back) == [EXPECTED[1]]


async def test_blocks_are_saved_before_others_come_back_to_their_places(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    out = pb.StepPlan(swap_out=pb.BlockPairs(src=[1, 2], dst=[4, 3]), freed_rows=[0])
    await stream.run(2, out)
    first = (await stream.run(3, begin(1, OTHER, [1, 2])))[0]
    exchange = pb.StepPlan(
        swap_out=pb.BlockPairs(src=[1, 2], dst=[0, 1]),
        freed_rows=[1],
        new_rows=new_rows(
            {"row": 0, "tokens": [*PROMPT, EXPECTED[0]], "blocks": [1, 2], "computed": 6}
        ),
        swap_in=pb.BlockPairs(src=[4, 3], dst=[1, 2]),
        batch=batch((0, 1)),
    )
    assert await stream.run(4, exchange) == [EXPECTED[1]]
    back = pb.StepPlan(
        new_rows=new_rows({"row": 1, "tokens": [*OTHER, first], "blocks": [5, 6], "computed": 7}),
        swap_in=pb.BlockPairs(src=[1, 0], dst=[6, 5]),
        batch=batch((0, 1), (1, 1), num_decode_rows=1),
    )
    assert await stream.run(5, back) == [EXPECTED[2], after(*OTHER, first)]


async def test_a_block_is_saved_before_a_copy_overwrites_it(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    await stream.run(2, begin(1, OTHER, [3, 4]))
    both = pb.StepPlan(
        swap_out=pb.BlockPairs(src=[1, 2], dst=[0, 1]),
        copy=pb.BlockPairs(src=[3, 4], dst=[1, 2]),
        freed_rows=[0, 1],
        new_rows=new_rows({"row": 2, "tokens": [*OTHER, 9], "blocks": [1, 2], "computed": 7}),
        batch=batch((2, 1)),
    )
    assert await stream.run(3, both) == [after(*OTHER, 9)]
    back = pb.StepPlan(
        new_rows=new_rows({"row": 0, "tokens": [*PROMPT, 9], "blocks": [7, 8], "computed": 6}),
        swap_in=pb.BlockPairs(src=[0, 1], dst=[7, 8]),
        batch=batch((0, 1)),
    )
    assert await stream.run(4, back) == [after(*PROMPT, 9)]


async def test_copies_are_made_before_the_first_write(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    known = [*PROMPT, EXPECTED[0]]
    plan = pb.StepPlan(
        copy=pb.BlockPairs(src=[1, 2], dst=[3, 4]),
        freed_rows=[0],
        new_rows=new_rows(
            {"row": 0, "tokens": OTHER, "blocks": [1, 2]},
            {"row": 1, "tokens": known, "blocks": [3, 4], "computed": 6},
        ),
        batch=batch((0, len(OTHER)), (1, 1)),
    )
    assert await stream.run(2, plan) == [after(*OTHER), EXPECTED[1]]


async def test_forks_read_every_source_before_they_write(stream: StepStream) -> None:
    driven = {"flags": pb.ROW_FLAG_DRIVEN}
    rows = new_rows(
        {"row": 0, "tokens": PROMPT, "blocks": [1, 2], **driven},
        {"row": 1, "tokens": OTHER, "blocks": [3, 4], **driven},
    )
    first = pb.StepPlan(new_rows=rows, batch=batch((0, 6), (1, 7)))
    assert await stream.run(1, first) == [after(*PROMPT), after(*OTHER)]
    exchange = pb.StepPlan(
        forks=pb.Forks(src_rows=[0, 1, 0], dst_rows=[1, 0, 2], tail_dst_block_ids=[0, 0, 9]),
        copy=pb.BlockPairs(src=[2], dst=[9]),
        inputs=pb.Inputs(rows=[0, 1, 2], token_ids=[100, 101, 102]),
        batch=batch((0, 1), (1, 1), (2, 1), num_decode_rows=3),
    )
    wanted = [after(*OTHER, 100), after(*PROMPT, 101), after(*PROMPT, 102)]
    assert await stream.run(2, exchange) == wanted


async def test_a_chain_of_forks_is_one_gather(stream: StepStream) -> None:
    driven = {"flags": pb.ROW_FLAG_DRIVEN}
    sequences = [PROMPT, OTHER, [8, 9, 10]]
    rows = new_rows(
        *(
            {"row": row, "tokens": tokens, "blocks": [2 * row + 1, 2 * row + 2], **driven}
            for row, tokens in enumerate(sequences)
        )
    )
    counts = [(row, len(tokens)) for row, tokens in enumerate(sequences)]
    await stream.run(1, pb.StepPlan(new_rows=rows, batch=batch(*counts)))
    # Each row goes on where the one before it was, and the last one is lost.
    chain = pb.StepPlan(
        forks=pb.Forks(src_rows=[0, 1], dst_rows=[1, 2], tail_dst_block_ids=[9, 0]),
        copy=pb.BlockPairs(src=[2], dst=[9]),
        inputs=pb.Inputs(rows=[0, 1, 2], token_ids=[100, 101, 102]),
        batch=batch((0, 1), (1, 1), (2, 1), num_decode_rows=3),
    )
    wanted = [after(*PROMPT, 100), after(*PROMPT, 101), after(*OTHER, 102)]
    assert await stream.run(2, chain) == wanted


async def test_samples_take_their_first_token_from_another_row(stream: StepStream) -> None:
    warm = {"temperature": 0.5, "seeds": 11}
    rows = new_rows(
        {"row": 0, "tokens": PROMPT, "blocks": [1, 2], **warm},
        {"row": 1, "tokens": PROMPT, "blocks": [1, 2], "computed": 6, "logits_from": 1}
        | {"branches": 1, **warm},
    )
    plan = pb.StepPlan(new_rows=rows, batch=batch((0, 6)))
    wanted = [
        reference_output(PROMPT, 1, INFO.vocab_size, SamplingParams(0.5, seed=11, branch=branch))
        for branch in (0, 1)
    ]
    assert await stream.run(1, plan) == [wanted[0][0], wanted[1][0]]


async def test_a_row_without_finite_logits_fails_alone(stream: StepStream) -> None:
    rows = new_rows(
        {"row": 0, "tokens": PROMPT, "blocks": [1, 2]},
        {"row": 1, "tokens": OTHER, "blocks": [3, 4], "seeds": 666},
    )
    await stream.send(1, pb.StepPlan(new_rows=rows, batch=batch((0, 6), (1, 7))))
    result = (await stream.next()).result
    assert list(result.failed_rows) == [1]
    assert list(result.failed_status) == [pb.ROW_STATUS_NUMERIC]
    assert result.token_ids[0] == EXPECTED[0]
    assert (await stream.run(2, decode(0, freed_rows=[1]))) == [EXPECTED[1]]


def _pairs(src: int, dst: int) -> pb.BlockPairs:
    return pb.BlockPairs(src=[src], dst=[dst])


_OUT, _IN = _pairs(1, 3), _pairs(3, 2)
BAD_PLANS: Final[dict[str, tuple[Callable[[], pb.StepPlan], str]]] = {
    "swap chain": (lambda: decode(0, swap_out=_OUT, swap_in=_IN), "swap_in source"),
    "copy chain": (
        lambda: decode(0, copy=pb.BlockPairs(src=[1, 5], dst=[5, 6])),
        "copy source is a copy destination",
    ),
    "copy of what comes in": (
        lambda: decode(0, copy=_pairs(2, 5), swap_in=_pairs(0, 2)),
        "copy source is a swap_in destination",
    ),
    "two writers": (
        lambda: decode(0, copy=pb.BlockPairs(src=[1, 2], dst=[5, 5])),
        "destination twice",
    ),
    "host block": (lambda: decode(0, swap_out=_pairs(1, 8)), "not a host block"),
    "padding block": (lambda: decode(0, appends=appends((0, [0]))), "not a usable block"),
    "block beyond the pool": (lambda: decode(0, appends=appends((0, [32]))), "not a usable block"),
    "block appended twice": (
        lambda: decode(0, appends=appends((0, [7, 7]))),
        "block twice",
    ),
    "dead row": (lambda: decode(0, 3), "not live"),
    "row twice": (lambda: decode(0, 0), "row twice"),
    "freed and run": (lambda: decode(0, freed_rows=[0]), "not live"),
    "freed twice": (lambda: decode(freed_rows=[0, 0]), "row twice"),
    "live row begun": (lambda: begin(0, OTHER, [5, 6]), "row is live"),
    "too few blocks": (lambda: begin(1, OTHER, [5]), "exceed the blocks"),
    "unknown token": (lambda: begin(1, [1000], [5]), "not in the vocabulary"),
    "more than is known": (lambda: pb.StepPlan(batch=batch((0, 2))), "beyond the known tokens"),
    "input for a free row": (
        lambda: decode(0, inputs=pb.Inputs(rows=[0], token_ids=[1])),
        "not driven",
    ),
    "fork of a row that is not driven": (
        lambda: decode(0, forks=pb.Forks(src_rows=[0], dst_rows=[1], tail_dst_block_ids=[0])),
        "not driven",
    ),
    "fork of a free row": (
        lambda: decode(0, forks=pb.Forks(src_rows=[1], dst_rows=[2], tail_dst_block_ids=[0])),
        "not live",
    ),
    "forks of two lengths": (
        lambda: decode(0, forks=pb.Forks(src_rows=[0, 0], dst_rows=[1])),
        "forks",
    ),
    "sample without logits": (
        lambda: begin(1, [*PROMPT, 7], [3, 4], logits_from=3),
        "logits_from",
    ),
    "columns of two lengths": (lambda: decode(0, copy=pb.BlockPairs(src=[1, 2], dst=[3])), "copy"),
    "good beginning, bad batch": (
        lambda: pb.StepPlan(
            freed_rows=[0],
            copy=_pairs(9, 1),
            new_rows=new_rows({"row": 0, "tokens": OTHER, "blocks": [1, 2]}),
            batch=batch((0, 7), (5, 1)),
        ),
        "not live",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
async def test_a_refused_plan_leaves_no_trace(name: str, stream: StepStream) -> None:
    make, reason = BAD_PLANS[name]
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    rejected = await stream.rejected(2, make())
    assert reason in rejected.reason
    assert rejected.expected_step_id == 2
    assert [await stream.run(2, decode(0)), await stream.run(3, decode(0))] == [
        EXPECTED[1:2],
        EXPECTED[2:3],
    ]


async def test_plans_queued_behind_a_refused_one_are_refused(stream: StepStream) -> None:
    await stream.send(1, begin(0, PROMPT, [1, 2]))
    await stream.send(2, decode(3))
    await stream.send(3, decode(0))
    assert await stream.tokens(1) == EXPECTED[:1]
    for step_id in (2, 3):
        rejected = (await stream.next()).rejected
        assert (rejected.step_id, rejected.expected_step_id) == (step_id, 2)
    assert await stream.run(2, decode(0)) == EXPECTED[1:2]


async def test_a_gap_is_refused_with_the_step_it_waits_for(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    assert (await stream.rejected(3, decode(0))).expected_step_id == 2
    assert await stream.run(2, decode(0)) == EXPECTED[1:2]


async def test_another_epoch_is_refused(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2]))
    epoch, stream.epoch = stream.epoch, stream.epoch - 1
    assert "epoch" in (await stream.rejected(2, decode(0))).reason
    stream.epoch = epoch
    assert await stream.run(2, decode(0)) == EXPECTED[1:2]


async def test_the_last_four_results_are_kept_for_resent_plans(stream: StepStream) -> None:
    await stream.run(1, begin(0, PROMPT, [1, 2, 3]))
    for step_id in range(2, 6):
        await stream.run(step_id, decode(0))
    for step_id in (2, 5, 3, 4):
        assert await stream.run(step_id, decode(0)) == [EXPECTED[step_id - 1]]
    assert "no longer kept" in (await stream.rejected(1, begin(0, PROMPT, [1, 2]))).reason
    assert await stream.run(6, decode(0)) == EXPECTED[5:6]

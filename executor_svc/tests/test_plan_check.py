"""Each rule of the contract, broken alone. Every bad plan leaves the rows as they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import fake_info
from executor_svc.plan import PlanError, decode
from executor_svc.plan_check import check
from executor_svc.row_state import RowState
from executor_svc.tests.plans import appends, batch, new_rows

INFO = fake_info(
    num_device_blocks=32,
    num_host_blocks=8,
    block_size=4,
    max_rows=8,
    max_model_len=30,
    max_num_batched_tokens=16,
    vocab_size=100,
)
DRIVEN = pb.ROW_FLAG_DRIVEN
TAIL = 12


def fresh(row: int = 5, **fields: Any) -> pb.NewRows:
    return new_rows({"row": row, "tokens": [1, 2, 3], "blocks": [20], **fields})


def decoding_rows() -> RowState:
    """Rows 0 and 1 decode, 2 is in prefill (3 of 10 done), 3 and 4 are driven and wait for inputs.

    The last batch was rows 0 and 1; each has 6 computed tokens in 2 blocks of 4.
    """
    state = RowState(INFO)
    tokens = list(range(10, 16))
    rows = new_rows(
        {"row": 0, "tokens": tokens, "blocks": [1, 2]},
        {"row": 1, "tokens": tokens, "blocks": [1, 3]},
        {"row": 2, "tokens": list(range(10)), "blocks": [4, 5, 6]},
    )
    driven = new_rows(
        {"row": 3, "tokens": tokens, "blocks": [7, 8], "flags": DRIVEN},
        {"row": 4, "tokens": tokens, "blocks": [7, 9], "flags": DRIVEN},
    )
    for plan in (
        pb.StepPlan(new_rows=rows, batch=batch((0, 5), (1, 5), (2, 3))),
        pb.StepPlan(new_rows=driven, batch=batch((3, 6), (4, 6))),
        pb.StepPlan(batch=batch((0, 1), (1, 1), num_decode_rows=2)),
    ):
        decoded = decode(plan)
        check(decoded, state, INFO)
        state.apply(decoded)
    return state


@pytest.fixture
def state() -> RowState:
    return decoding_rows()


def pairs(src: list[int], dst: list[int]) -> pb.BlockPairs:
    return pb.BlockPairs(src=src, dst=dst)


LEGAL: dict[str, pb.StepPlan] = {
    "nothing": pb.StepPlan(),
    "the same batch": pb.StepPlan(batch=pb.Batch(same=True)),
    "decode and prefill": pb.StepPlan(batch=batch((0, 1), (2, 7), num_decode_rows=1)),
    "freed and begun again": pb.StepPlan(freed_rows=[0], new_rows=fresh(0), batch=batch((0, 3))),
    "growth": pb.StepPlan(appends=appends((0, [10, 11]))),
    "growth of a new row": pb.StepPlan(
        new_rows=fresh(tokens=[1] * 5), appends=appends((5, [21])), batch=batch((5, 5))
    ),
    "shared prefix": pb.StepPlan(new_rows=fresh(blocks=[1, 20], tokens=[1] * 7, computed=4)),
    "all moves": pb.StepPlan(
        swap_out=pairs([1, 2], [0, 1]), copy=pairs([3], [10]), swap_in=pairs([2], [11])
    ),
    "one source twice": pb.StepPlan(copy=pairs([1, 1], [10, 11])),
    "driven rows with inputs": pb.StepPlan(
        inputs=pb.Inputs(rows=[3, 4], token_ids=[1, 99]), batch=batch((3, 1), (4, 1))
    ),
    "fork onto each other": pb.StepPlan(
        forks=pb.Forks(src_rows=[3, 4], dst_rows=[4, 3], tail_dst_block_ids=[0, TAIL])
    ),
    "fork onto a free row": pb.StepPlan(
        forks=pb.Forks(src_rows=[3], dst_rows=[6]),
        inputs=pb.Inputs(rows=[6], token_ids=[7]),
        batch=batch((6, 1)),
    ),
    "logits of another row": pb.StepPlan(
        new_rows=fresh(tokens=list(range(10)), computed=10, blocks=[4, 5, 6], logits_from=2 + 1),
        batch=batch((2, 7)),
    ),
    "most candidates": pb.StepPlan(new_rows=fresh(num_candidates=64)),
    "penalties with history": pb.StepPlan(
        new_rows=fresh(flags=pb.ROW_FLAG_HISTORY, repetition_penalty=1.2)
    ),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name: str, state: RowState) -> None:
    check(decode(LEGAL[name]), state, INFO)


BROKEN: dict[str, tuple[str, pb.StepPlan]] = {
    # block moves
    "host id out of range": ("not a host block", pb.StepPlan(swap_out=pairs([1], [8]))),
    "host source out of range": ("not a host block", pb.StepPlan(swap_in=pairs([8], [1]))),
    "padding block copied": ("not a usable block", pb.StepPlan(copy=pairs([0], [1]))),
    "copy out of range": ("not a usable block", pb.StepPlan(copy=pairs([1], [32]))),
    "padding block swapped in": ("not a usable block", pb.StepPlan(swap_in=pairs([1], [0]))),
    "swap_out out of range": ("not a usable block", pb.StepPlan(swap_out=pairs([99], [1]))),
    "copy source and destination": (
        "copy source is a copy destination",
        pb.StepPlan(copy=pairs([10, 11], [11, 12])),
    ),
    "swap_out destination that swap_in reads": (
        "swap_out destination is a swap_in source",
        pb.StepPlan(swap_out=pairs([1], [3]), swap_in=pairs([3], [10])),
    ),
    "copy source that swap_in writes": (
        "copy source is a swap_in destination",
        pb.StepPlan(copy=pairs([10], [11]), swap_in=pairs([3], [10])),
    ),
    "one destination twice": ("destination twice", pb.StepPlan(copy=pairs([1, 2], [10, 10]))),
    # rows that end and begin
    "free a dead row": ("row is not live", pb.StepPlan(freed_rows=[5])),
    "free twice": ("row twice", pb.StepPlan(freed_rows=[0, 0])),
    "free no row": ("no such row", pb.StepPlan(freed_rows=[8])),
    "begin a live row": ("row is live", pb.StepPlan(new_rows=fresh(0))),
    "begin a forked row": (
        "row is live",
        pb.StepPlan(forks=pb.Forks(src_rows=[3], dst_rows=[5]), new_rows=fresh(5)),
    ),
    "begin out of range": ("no such row", pb.StepPlan(new_rows=fresh(8))),
    "begin twice": (
        "row twice",
        pb.StepPlan(new_rows=new_rows(*[{"row": 5, "tokens": [1], "blocks": [20]}] * 2)),
    ),
    "no tokens": ("num_tokens: out of range", pb.StepPlan(new_rows=fresh(tokens=[]))),
    "too many tokens": (
        "num_tokens: out of range",
        pb.StepPlan(new_rows=fresh(tokens=[1] * 31, blocks=list(range(20, 28)))),
    ),
    "prompt longer than tokens": (
        "num_prompt_tokens",
        pb.StepPlan(new_rows=fresh(num_prompt_tokens=4)),
    ),
    "all computed": ("if and only if logits_from", pb.StepPlan(new_rows=fresh(computed=3))),
    "logits_from, not all computed": (
        "if and only if logits_from",
        pb.StepPlan(new_rows=fresh(logits_from=1), batch=batch((0, 1))),
    ),
    "table too long": (
        "block_counts: too many",
        pb.StepPlan(new_rows=fresh(blocks=list(range(10, 19)))),
    ),
    "computed tokens without blocks": (
        "computed tokens exceed the blocks",
        pb.StepPlan(new_rows=fresh(tokens=[1] * 6, computed=5)),
    ),
    "padding block in a table": ("not a usable block", pb.StepPlan(new_rows=fresh(blocks=[0]))),
    "block out of range": ("not a usable block", pb.StepPlan(new_rows=fresh(blocks=[32]))),
    "block twice in a table": (
        "block twice in one table",
        pb.StepPlan(new_rows=fresh(blocks=[20, 20])),
    ),
    "token not in the vocabulary": (
        "not in the vocabulary",
        pb.StepPlan(new_rows=fresh(tokens=[100])),
    ),
    # sampling
    "unknown flag": ("unknown bits", pb.StepPlan(new_rows=fresh(flags=4))),
    "too many candidates": ("num_candidates", pb.StepPlan(new_rows=fresh(num_candidates=65))),
    "negative temperature": ("temperature", pb.StepPlan(new_rows=fresh(temperature=-0.1))),
    "infinite temperature": ("temperature", pb.StepPlan(new_rows=fresh(temperature=np.inf))),
    "temperature NaN": ("temperature", pb.StepPlan(new_rows=fresh(temperature=np.nan))),
    "top_p above 1": ("top_p", pb.StepPlan(new_rows=fresh(top_p=1.5))),
    "min_p NaN": ("min_p", pb.StepPlan(new_rows=fresh(min_p=np.nan))),
    "penalty without history": (
        "penalties without history",
        pb.StepPlan(new_rows=fresh(presence_penalty=0.5)),
    ),
    "penalty NaN": (
        "penalty is not finite",
        pb.StepPlan(new_rows=fresh(flags=1, frequency_penalty=np.nan)),
    ),
    "negative repetition penalty": (
        "repetition_penalty",
        pb.StepPlan(new_rows=fresh(flags=1, repetition_penalty=-1)),
    ),
    # samples
    "logits of a row that does not sample": (
        "does not sample here",
        pb.StepPlan(
            new_rows=fresh(tokens=[0] * 10, computed=10, blocks=[4, 5, 6], logits_from=2 + 1),
            batch=batch((2, 6)),
        ),
    ),
    "logits of a row outside the batch": (
        "does not sample here",
        pb.StepPlan(new_rows=fresh(computed=3, logits_from=0 + 1)),
    ),
    "logits of a longer row": (
        "lengths differ",
        pb.StepPlan(new_rows=fresh(computed=3, logits_from=0 + 1), batch=batch((0, 1))),
    ),
    "logits of no row": (
        "logits_from: no such row",
        pb.StepPlan(new_rows=fresh(computed=3, logits_from=9)),
    ),
    # forks
    "fork of a dead row": (
        "row is not live",
        pb.StepPlan(forks=pb.Forks(src_rows=[5], dst_rows=[3])),
    ),
    "fork of a row freed here": (
        "row is not live",
        pb.StepPlan(freed_rows=[3], forks=pb.Forks(src_rows=[3], dst_rows=[4])),
    ),
    "fork of a row that samples for itself": (
        "row is not driven",
        pb.StepPlan(forks=pb.Forks(src_rows=[0], dst_rows=[5])),
    ),
    "fork onto a row that samples for itself": (
        "row is not driven",
        pb.StepPlan(forks=pb.Forks(src_rows=[3], dst_rows=[0])),
    ),
    "two forks onto one row": (
        "row twice",
        pb.StepPlan(forks=pb.Forks(src_rows=[3, 4], dst_rows=[5, 5])),
    ),
    "fork out of range": (
        "no such row",
        pb.StepPlan(forks=pb.Forks(src_rows=[3], dst_rows=[8])),
    ),
    "tail out of range": (
        "not a usable block",
        pb.StepPlan(forks=pb.Forks(src_rows=[3], dst_rows=[4], tail_dst_block_ids=[32])),
    ),
    "one tail twice": (
        "block twice",
        pb.StepPlan(
            forks=pb.Forks(src_rows=[3, 4], dst_rows=[3, 4], tail_dst_block_ids=[TAIL, TAIL])
        ),
    ),
    "a tail that is appended too": (
        "block twice",
        pb.StepPlan(
            forks=pb.Forks(src_rows=[3], dst_rows=[4], tail_dst_block_ids=[TAIL]),
            appends=appends((0, [TAIL])),
        ),
    ),
    # appends
    "append to a dead row": ("row is not live", pb.StepPlan(appends=appends((5, [10])))),
    "append to a row twice": ("row twice", pb.StepPlan(appends=appends((0, [10]), (0, [11])))),
    "append one block twice": ("block twice", pb.StepPlan(appends=appends((0, [10]), (1, [10])))),
    "append the padding block": ("not a usable block", pb.StepPlan(appends=appends((0, [0])))),
    "append out of range": ("not a usable block", pb.StepPlan(appends=appends((0, [32])))),
    "append beyond the table": (
        "block table is full",
        pb.StepPlan(appends=appends((0, list(range(10, 17))))),
    ),
    # inputs
    "input of a row that samples for itself": (
        "row is not driven",
        pb.StepPlan(inputs=pb.Inputs(rows=[0], token_ids=[1])),
    ),
    "input of a dead row": ("row is not live", pb.StepPlan(inputs=pb.Inputs(rows=[5]))),
    "input twice": ("row twice", pb.StepPlan(inputs=pb.Inputs(rows=[3, 3]))),
    "input not in the vocabulary": (
        "not in the vocabulary",
        pb.StepPlan(inputs=pb.Inputs(rows=[3], token_ids=[100])),
    ),
    "input of a row in prefill": (
        "still has tokens to compute",
        pb.StepPlan(new_rows=fresh(flags=DRIVEN), inputs=pb.Inputs(rows=[5]), batch=batch((5, 3))),
    ),
    # the batch
    "row not live": ("row is not live", pb.StepPlan(batch=batch((5, 1)))),
    "row freed here": ("row is not live", pb.StepPlan(freed_rows=[0], batch=batch((0, 1)))),
    "no such row": ("no such row", pb.StepPlan(batch=batch((8, 1)))),
    "row in the batch twice": ("row twice", pb.StepPlan(batch=batch((2, 1), (2, 1)))),
    "zero tokens": ("zero", pb.StepPlan(batch=batch((2, 0)))),
    "decode row with two tokens": (
        "exactly one token",
        pb.StepPlan(batch=batch((2, 2), num_decode_rows=1)),
    ),
    "more decode rows than rows": (
        "more than rows",
        pb.StepPlan(batch=batch((0, 1), num_decode_rows=2)),
    ),
    "token budget": (
        "exceed max_num_batched_tokens",
        pb.StepPlan(
            new_rows=fresh(tokens=[1] * 17, blocks=[20, 21, 22, 23, 24]), batch=batch((5, 17))
        ),
    ),
    "beyond the known tokens": ("beyond the known tokens", pb.StepPlan(batch=batch((2, 8)))),
    "two tokens of a decoding row": ("beyond the known tokens", pb.StepPlan(batch=batch((0, 2)))),
    "no block for the tokens": (
        "exceed the blocks",
        pb.StepPlan(new_rows=fresh(tokens=[1] * 5), batch=batch((5, 5))),
    ),
    "driven row without an input": (
        "driven row without an input",
        pb.StepPlan(batch=batch((3, 1))),
    ),
    "same batch, a row freed": (
        "row is not live",
        pb.StepPlan(freed_rows=[1], batch=pb.Batch(same=True)),
    ),
    "same batch, a row begun again with more tokens": (
        "more than one token",
        pb.StepPlan(freed_rows=[1], new_rows=fresh(1), batch=pb.Batch(same=True)),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, state: RowState) -> None:
    reason, message = BROKEN[name]
    before = copy.deepcopy(vars(state))
    with pytest.raises(PlanError, match=reason):
        check(decode(message), state, INFO)
    for key, value in before.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(state, key), value)


def advance(state: RowState, message: pb.StepPlan) -> None:
    plan = decode(message)
    check(plan, state, INFO)
    state.apply(plan)


def test_same_batch_after_an_empty_one(state: RowState) -> None:
    advance(state, pb.StepPlan())
    with pytest.raises(PlanError, match="previous batch is empty"):
        advance(state, pb.StepPlan(batch=pb.Batch(same=True)))


def test_same_batch_after_an_unfinished_prefill(state: RowState) -> None:
    advance(state, pb.StepPlan(batch=batch((0, 1), (2, 3), num_decode_rows=1)))
    with pytest.raises(PlanError, match="more than one token"):
        advance(state, pb.StepPlan(batch=pb.Batch(same=True)))


def test_decode_needs_a_block_in_time(state: RowState) -> None:
    same = pb.StepPlan(batch=pb.Batch(same=True))
    advance(state, same)
    advance(state, same)  # 8 tokens in 2 blocks of 4
    with pytest.raises(PlanError, match="exceed the blocks"):
        advance(state, same)
    advance(state, pb.StepPlan(appends=appends((0, [10]), (1, [11])), batch=pb.Batch(same=True)))


def test_decode_ends_at_max_model_len(state: RowState) -> None:
    blocks = appends((0, [10, 11, 12, 13, 14, 15]))
    one_token = pb.StepPlan(batch=batch((0, 1)))
    advance(state, pb.StepPlan(appends=blocks))
    for _ in range(6, 30):
        advance(state, one_token)
    with pytest.raises(PlanError, match="beyond max_model_len"):
        advance(state, one_token)


def test_a_driven_row_takes_one_input_at_a_time(state: RowState) -> None:
    given = pb.StepPlan(inputs=pb.Inputs(rows=[3], token_ids=[1]))
    advance(state, given)
    with pytest.raises(PlanError, match="still has tokens to compute"):
        advance(state, given)
    advance(state, pb.StepPlan(batch=batch((3, 1))))
    advance(state, given)

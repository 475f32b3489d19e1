"""Applying plans: tables, lengths, inputs, histories; examples, a plain model, and the cost."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from blockyard.common.columns import pack_u32
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import fake_info
from executor_svc.plan import decode
from executor_svc.plan_check import check
from executor_svc.row_state import RowState, TokenLog
from executor_svc.runner import LAST_SAMPLED, RunnerInfo, StepBatch
from executor_svc.tests.plans import appends, batch, new_rows

INFO = fake_info(num_device_blocks=512, block_size=4, max_rows=8, max_model_len=64)
HISTORY, DRIVEN = pb.ROW_FLAG_HISTORY, pb.ROW_FLAG_DRIVEN
SAME = pb.StepPlan(batch=pb.Batch(same=True))


@pytest.fixture
def state() -> RowState:
    return RowState(INFO)


def apply(state: RowState, message: pb.StepPlan, info: RunnerInfo = INFO) -> StepBatch:
    plan = decode(message)
    check(plan, state, info)
    return state.apply(plan)


def table(state: RowState, row: int) -> list[int]:
    return [int(block_id) for block_id in state.block_table[row, : state.num_blocks[row]]]


def test_chunked_prefill_then_decode(state: RowState) -> None:
    rows = new_rows({"row": 2, "tokens": [10, 11, 12, 13, 14], "blocks": [5, 6]})
    first = apply(state, pb.StepPlan(new_rows=rows, batch=batch((2, 3))))
    assert first.token_ids.tolist() == [10, 11, 12]
    assert first.sampling_rows.size == first.logits_indices.size == 0

    second = apply(state, pb.StepPlan(batch=batch((2, 2))))
    assert second.token_ids.tolist() == [13, 14]
    assert second.num_computed_tokens.tolist() == [3]
    assert second.sampling_rows.tolist() == [2]
    assert second.logits_indices.tolist() == [1]
    assert second.sample_positions.tolist() == [5]

    third = apply(state, pb.StepPlan(batch=batch((2, 1), num_decode_rows=1)))
    assert third.token_ids.tolist() == [LAST_SAMPLED]
    assert third.num_computed_tokens.tolist() == [5]
    assert third.sample_positions.tolist() == [6]
    fourth = apply(state, SAME)
    assert (fourth.rows.tolist(), fourth.num_decode_rows) == ([2], 1)
    assert fourth.sample_positions.tolist() == [7]
    assert state.num_tokens[2] == 8


def test_a_mixed_batch_is_flattened_in_plan_order(state: RowState) -> None:
    rows = new_rows(
        {"row": 0, "tokens": [1], "blocks": [1]}, {"row": 1, "tokens": [2, 3], "blocks": [2]}
    )
    apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 1), num_decode_rows=1)))
    later = new_rows({"row": 3, "tokens": [7, 8, 9], "blocks": [3], "computed": 1})
    step = apply(
        state,
        pb.StepPlan(new_rows=later, batch=batch((0, 1), (3, 1), (1, 2), num_decode_rows=1)),
    )
    assert step.token_ids.tolist() == [LAST_SAMPLED, 8, 2, 3]
    assert step.sampling_rows.tolist() == [0, 1]
    assert step.logits_indices.tolist() == [0, 3]
    assert step.sample_positions.tolist() == [2, 2]
    assert step.num_decode_rows == 1


def test_a_resumed_row_decodes_from_a_delivered_token(state: RowState) -> None:
    rows = new_rows({"row": 0, "tokens": [1, 2, 3, 4], "blocks": [1], "computed": 3})
    plan = pb.StepPlan(new_rows=rows, batch=batch((0, 1), num_decode_rows=1))
    assert apply(state, plan).token_ids.tolist() == [4]
    grown = pb.StepPlan(appends=appends((0, [2])), batch=pb.Batch(same=True))
    assert apply(state, grown).token_ids.tolist() == [LAST_SAMPLED]


def test_a_reused_row_forgets_its_predecessor(state: RowState) -> None:
    first = new_rows({"row": 0, "tokens": [1, 2], "blocks": [1, 2, 3], "seeds": 7, "top_k": 3})
    apply(state, pb.StepPlan(new_rows=first, batch=batch((0, 1))))
    again = new_rows({"row": 0, "tokens": [8, 9], "blocks": [4], "seeds": 5})
    step = apply(state, pb.StepPlan(freed_rows=[0], new_rows=again, batch=batch((0, 2))))
    assert step.token_ids.tolist() == [8, 9]
    assert table(state, 0) == [4]
    assert (state.seeds[0], state.top_k[0]) == (5, 0)


def test_appends_of_several_blocks(state: RowState) -> None:
    rows = new_rows(
        {"row": 0, "tokens": [1], "blocks": [1]}, {"row": 1, "tokens": [2], "blocks": [2, 3]}
    )
    apply(state, pb.StepPlan(new_rows=rows, appends=appends((1, [4, 5, 6]), (0, [7]))))
    assert table(state, 0) == [1, 7]
    assert table(state, 1) == [2, 3, 4, 5, 6]
    apply(state, pb.StepPlan(appends=appends((0, [8]), (1, [9]))))
    assert table(state, 0) == [1, 7, 8]
    assert table(state, 1) == [2, 3, 4, 5, 6, 9]


def test_forks_read_all_sources_before_they_write(state: RowState) -> None:
    rows = new_rows(
        {"row": 0, "tokens": [1] * 5, "blocks": [1, 2], "flags": DRIVEN, "seeds": 100},
        {"row": 1, "tokens": [2] * 6, "blocks": [1, 3], "flags": DRIVEN, "seeds": 101},
    )
    apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 5), (1, 6))))
    forks = pb.Forks(src_rows=[1, 0, 1], dst_rows=[0, 1, 5], tail_dst_block_ids=[0, 8, 9])
    step = apply(
        state,
        pb.StepPlan(
            forks=forks,
            inputs=pb.Inputs(rows=[0, 5], token_ids=[50, 55]),
            batch=batch((5, 1), (0, 1), num_decode_rows=2),
        ),
    )
    assert [table(state, row) for row in (0, 1, 5)] == [[1, 3], [1, 8], [1, 9]]
    assert step.token_ids.tolist() == [55, 50]
    assert step.num_computed_tokens.tolist() == [6, 6]
    assert state.num_tokens[[0, 1, 5]].tolist() == [7, 5, 7]
    # A live destination keeps its own sampling, a row that begins takes the source's.
    assert state.seeds[[0, 1, 5]].tolist() == [100, 101, 101]
    assert state.flags[5] == DRIVEN


def test_a_fork_in_prefill_shares_what_is_still_to_compute(state: RowState) -> None:
    rows = new_rows({"row": 0, "tokens": [1, 2, 3], "blocks": [1], "flags": DRIVEN})
    apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 1))))
    forks = pb.Forks(src_rows=[0], dst_rows=[1], tail_dst_block_ids=[2])
    step = apply(state, pb.StepPlan(forks=forks, batch=batch((0, 2), (1, 2))))
    assert step.token_ids.tolist() == [2, 3, 2, 3]


def test_samples_borrow_the_logits_of_the_row_that_prefills(state: RowState) -> None:
    rows = new_rows(
        {"row": 3, "tokens": [1, 2, 3], "blocks": [1]},
        {"row": 5, "tokens": [1, 2, 3], "blocks": [1], "computed": 3, "logits_from": 4},
        {"row": 6, "tokens": [7, 8], "blocks": [2]},
        {"row": 1, "tokens": [1, 2, 3], "blocks": [1], "computed": 3, "logits_from": 4},
    )
    step = apply(state, pb.StepPlan(new_rows=rows, batch=batch((6, 2), (3, 3))))
    assert step.sampling_rows.tolist() == [6, 3, 5, 1]
    assert step.logits_indices.tolist() == [1, 4, 4, 4]
    assert step.sample_positions.tolist() == [2, 3, 3, 3]
    forward = apply(state, pb.StepPlan(batch=batch((5, 1), (1, 1), num_decode_rows=2)))
    assert forward.token_ids.tolist() == [LAST_SAMPLED] * 2
    assert forward.num_computed_tokens.tolist() == [3, 3]


def test_a_driven_row_waits_for_its_input(state: RowState) -> None:
    rows = new_rows({"row": 0, "tokens": [1, 2], "blocks": [1], "flags": DRIVEN})
    apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 2))))
    assert state.num_tokens[0] == 2
    step = apply(
        state, pb.StepPlan(inputs=pb.Inputs(rows=[0], token_ids=[0]), batch=pb.Batch(rows=[0]))
    )
    assert step.token_ids.tolist() == [0]
    assert step.sample_positions.tolist() == [3]


def test_prompts_are_dropped_once_computed(state: RowState) -> None:
    rows = new_rows({"row": 0, "tokens": [1, 2], "blocks": [1]})
    apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 2))))
    with pytest.raises(KeyError):
        state.history(0)


def test_history_is_kept_and_grows_with_results(state: RowState) -> None:
    rows = new_rows(
        {"row": 0, "tokens": [1, 2, 3], "blocks": [1], "computed": 2, "flags": HISTORY},
        {"row": 1, "tokens": [4], "blocks": [2]},
    )
    step = apply(state, pb.StepPlan(new_rows=rows, batch=batch((1, 1), (0, 1))))
    assert state.history(0).tolist() == [1, 2, 3]
    [(log, index)] = state.growing_logs(step)
    assert (index, step.sampling_rows[index]) == (1, 0)
    for token_id in range(100, 140):
        log.append(token_id)
    assert state.history(0).tolist() == [1, 2, 3, *range(100, 140)]


def test_history_of_driven_rows_grows_with_inputs_and_forks(state: RowState) -> None:
    flags = HISTORY | DRIVEN
    rows = new_rows({"row": 0, "tokens": [1, 2], "blocks": [1], "flags": flags})
    step = apply(state, pb.StepPlan(new_rows=rows, batch=batch((0, 2))))
    assert state.growing_logs(step) == []
    forks = pb.Forks(src_rows=[0], dst_rows=[1])
    inputs = pb.Inputs(rows=[0, 1], token_ids=[7, 8])
    apply(state, pb.StepPlan(forks=forks, inputs=inputs))
    assert state.history(0).tolist() == [1, 2, 7]
    assert state.history(1).tolist() == [1, 2, 8]


def test_late_results_do_not_reach_a_row_s_successor(state: RowState) -> None:
    def begin(tokens: list[int]) -> pb.NewRows:
        return new_rows({"row": 0, "tokens": tokens, "blocks": [1], "flags": HISTORY})

    step = apply(state, pb.StepPlan(new_rows=begin([1]), batch=batch((0, 1))))
    [(log, _)] = state.growing_logs(step)
    apply(state, pb.StepPlan(freed_rows=[0], new_rows=begin([9])))
    log.append(2)
    assert state.history(0).tolist() == [9]


def test_reset_drops_all_rows(state: RowState) -> None:
    rows = new_rows({"row": 0, "tokens": [1, 2], "blocks": [1], "flags": HISTORY})
    plan = pb.StepPlan(new_rows=rows, batch=batch((0, 1)))
    apply(state, plan)
    state.reset()
    assert not state.is_live.any()
    assert not state.batch_rows.size
    assert apply(state, plan).token_ids.tolist() == [1]


def test_an_empty_batch(state: RowState) -> None:
    step = apply(state, pb.StepPlan())
    assert step.rows.size == step.token_ids.size == step.sampling_rows.size == 0


def test_token_log_spans() -> None:
    log = TokenLog(5, np.array([1, 2, 3], np.uint32))
    assert log.span(6, 8).tolist() == [2, 3]
    with pytest.raises(AssertionError):
        log.span(4, 6)


@dataclass
class PlainRow:
    """What a row is, in plain Python: None stands for a token that only the device knows."""

    tokens: list[int | None]
    blocks: list[int]
    num_computed: int = 0


@dataclass
class PlainRows:
    """Random legal plans, and what they should do. Ordinary rows; the rest has examples above."""

    random: random.Random
    rows: dict[int, PlainRow] = field(default_factory=dict)
    next_block: int = 1

    def take_blocks(self, count: int) -> list[int]:
        ids = [1 + (self.next_block + i) % 500 for i in range(count)]
        self.next_block += count
        return ids

    def plan(self) -> tuple[pb.StepPlan, list[tuple[int, list[int | None], int]]]:
        """A plan, and per batch row: its id, input tokens and tokens computed before."""
        message = pb.StepPlan()
        for row in [row for row in self.rows if self.random.random() < 0.1]:
            del self.rows[row]
            message.freed_rows.append(row)
        self._begin(message)
        chosen = [row for row in self.rows if self.random.random() < 0.7]
        expected, grown, entries = [], [], []
        for row in chosen:
            plain = self.rows[row]
            room = min(len(plain.tokens) - plain.num_computed, 60 - plain.num_computed, 5)
            if room < 1:
                continue
            count = self.random.randint(1, room)
            end = plain.num_computed + count
            missing = -(-end // 4) - len(plain.blocks)
            if missing > 0:
                ids = self.take_blocks(missing)
                plain.blocks += ids
                grown.append((row, ids))
            expected.append((row, plain.tokens[plain.num_computed : end], plain.num_computed))
            entries.append((row, count))
            plain.num_computed = end
            if end == len(plain.tokens):
                plain.tokens.append(None)
        message.appends.CopyFrom(appends(*grown))
        message.batch.CopyFrom(batch(*entries))
        return message, expected

    def _begin(self, message: pb.StepPlan) -> None:
        free = [row for row in range(8) if row not in self.rows]
        begun = []
        for row in self.random.sample(free, self.random.randint(0, len(free))):
            tokens = [self.random.randrange(1000) for _ in range(self.random.randint(1, 20))]
            computed = self.random.randrange(len(tokens))
            blocks = self.take_blocks(-(-computed // 4) + self.random.randint(0, 1))
            self.rows[row] = PlainRow([*tokens], blocks, computed)
            begun.append({"row": row, "tokens": tokens, "blocks": blocks, "computed": computed})
        if begun:
            message.new_rows.CopyFrom(new_rows(*begun))


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_against_plain_rows(seed: int, state: RowState) -> None:
    plain = PlainRows(random.Random(seed))
    for _ in range(60):
        message, expected = plain.plan()
        step = apply(state, message)
        tokens = [token for _, ids, _ in expected for token in ids]
        want = [LAST_SAMPLED if token is None else token for token in tokens]
        assert step.token_ids.tolist() == want
        assert step.num_computed_tokens.tolist() == [computed for _, _, computed in expected]
        sampling = [row for row, _, _ in expected if plain.rows[row].tokens[-1] is None]
        assert step.sampling_rows.tolist() == sampling
        for row, want_row in plain.rows.items():
            assert table(state, row) == want_row.blocks
            assert state.num_tokens[row] == len(want_row.tokens)
        assert np.flatnonzero(state.is_live).tolist() == sorted(plain.rows)


def test_a_steady_decode_step_costs_little_more_with_1024_rows_than_with_16() -> None:
    # Decode, check and apply: some 60 us, nearly none of which is for a row.
    costs_s = {num_rows: _steady_decode_s(num_rows) for num_rows in (16, 1024)}
    assert costs_s[1024] < 3 * costs_s[16], costs_s


def _steady_decode_s(num_rows: int) -> float:
    """Of several such steps, the time of the fastest."""
    info = fake_info(
        num_device_blocks=num_rows + 1, max_rows=num_rows, max_num_batched_tokens=num_rows
    )
    state = RowState(info)
    ids = list(range(1, num_rows + 1))
    rows = pb.NewRows(
        rows=range(num_rows),
        num_tokens=[1] * num_rows,
        num_prompt_tokens=[1] * num_rows,
        token_ids=pack_u32(ids[:1] * num_rows),
        block_counts=[1] * num_rows,
        block_ids=pack_u32(ids),
    )
    first = pb.Batch(rows=range(num_rows), num_decode_rows=num_rows)
    apply(state, pb.StepPlan(new_rows=rows, batch=first), info)
    costs_s = []
    for _ in range(15):
        start = time.perf_counter()
        apply(state, SAME, info)
        costs_s.append(time.perf_counter() - start)
    return min(costs_s)

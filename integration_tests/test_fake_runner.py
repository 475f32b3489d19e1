"""The fake executor against the reference, by hand-made plans; and that it can fail."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.digests import candidates, next_tokens, token_logprob
from executor_svc.backends.checking.runner import DEVICE, FakeOptions, FakeRunner, fake_info
from executor_svc.plan import PlanError
from executor_svc.tests.plans import appends, batch, new_rows
from integration_tests.fake_executor import SyncExecutor
from integration_tests.reference import SamplingParams, context_of, reference_output

VOCAB = 1000
PROMPT = [random.Random(1).randrange(VOCAB) for _ in range(9)]
INFO = fake_info(40, 10, block_size=4, max_rows=8, max_model_len=128, vocab_size=VOCAB)


class Driver:
    """Numbers the plans and remembers what each row sampled."""

    def __init__(self, options: FakeOptions | None = None) -> None:
        self.executor = SyncExecutor(FakeRunner(INFO, options))
        self.step_id = 0
        self.outputs: dict[int, list[int]] = {}

    def run(self, **parts: object) -> pb.StepResult:
        self.step_id += 1
        plan = pb.StepPlan(epoch=self.executor.epoch, step_id=self.step_id)
        for name, part in parts.items():
            getattr(plan, name).MergeFrom(part)
        result = self.executor.run(plan)
        return result

    def decode(self, row: int, num_tokens: int, blocks: list[int]) -> list[int]:
        """One token a step, with the blocks appended when they are needed."""
        state = self.executor.state
        tokens: list[int] = []
        for _ in range(num_tokens):
            parts: dict[str, object] = {"batch": batch((row, 1), num_decode_rows=1)}
            if state.num_computed_tokens[row] == 4 * state.num_blocks[row]:
                parts["appends"] = appends((row, [blocks.pop(0)]))
            tokens += self.run(**parts).token_ids
        return tokens


@pytest.fixture
def driver() -> Driver:
    return Driver()


def begin(row: int, **fields: object) -> pb.NewRows:
    return new_rows({"row": row, "tokens": PROMPT, "blocks": [3, 1, 2], **fields})


def test_chunked_prefill_and_decode_equal_the_reference(driver: Driver) -> None:
    driver.run(new_rows=begin(0), batch=batch((0, 4)))
    first = driver.run(batch=batch((0, 5))).token_ids
    rest = driver.decode(0, 20, [7, 9, 8, 6, 5, 4])
    assert [*first, *rest] == reference_output(PROMPT, 21, VOCAB)


def test_sampling_parameters_reach_the_sampler(driver: Driver) -> None:
    params = SamplingParams(0.7, top_k=5, top_p=0.9, min_p=0.1, seed=2**63 + 5, branch=3)
    fields = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seeds": params.seed}
    first = driver.run(new_rows=begin(0, branches=3, **fields), batch=batch((0, 9))).token_ids
    output = [*first, *driver.decode(0, 3, [7])]
    assert output == reference_output(PROMPT, 4, VOCAB, params)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "branch"):
        changed = SamplingParams(
            **{f: getattr(params, f) + (f == name) for f in params.__dataclass_fields__}
        )
        assert output != reference_output(PROMPT, 4, VOCAB, changed), name


def test_two_rows_of_one_plan_may_share_a_prefix(driver: Driver) -> None:
    rows = new_rows(
        {"row": 0, "tokens": PROMPT, "blocks": [1, 2, 3], "computed": 8},
        {"row": 1, "tokens": PROMPT, "blocks": [1, 2, 4]},
    )
    tokens = driver.run(new_rows=rows, batch=batch((0, 1), (1, 9))).token_ids
    assert list(tokens) == reference_output(PROMPT, 1, VOCAB) * 2


def test_samples_share_blocks_and_copy_tails(driver: Driver) -> None:
    rows = new_rows(
        *(
            {
                "row": row,
                "tokens": PROMPT,
                "blocks": [1, 2, 3],
                "temperature": 1,
                "seeds": 9,
                "branches": row,
                "computed": 9 if row else 0,
                "logits_from": 1 if row else 0,
            }
            for row in range(3)
        )
    )
    outputs = [[token] for token in driver.run(new_rows=rows, batch=batch((0, 9))).token_ids]
    # Rows 1 and 2 leave the shared tail: the data by copy, the table by beginning again.
    again = new_rows(
        *(
            {
                "row": row,
                "tokens": [*PROMPT, *outputs[row]],
                "blocks": [1, 2, 10 + row],
                "temperature": 1,
                "seeds": 9,
                "branches": row,
                "computed": 9,
            }
            for row in (1, 2)
        )
    )
    tokens = driver.run(
        copy=pb.BlockPairs(src=[3, 3], dst=[11, 12]),
        freed_rows=[1, 2],
        new_rows=again,
        batch=batch((0, 1), (1, 1), (2, 1), num_decode_rows=3),
    ).token_ids
    for branch, (output, token) in enumerate(zip(outputs, tokens, strict=True)):
        params = SamplingParams(temperature=1, seed=9, branch=branch)
        assert [*output, token] == reference_output(PROMPT, 2, VOCAB, params)


def test_swap_out_and_in(driver: Driver) -> None:
    first = driver.run(new_rows=begin(0), batch=batch((0, 9))).token_ids
    driver.run(swap_out=pb.BlockPairs(src=[3, 1], dst=[0, 5]), freed_rows=[0])
    driver.run(new_rows=new_rows({"row": 4, "tokens": [5] * 12, "blocks": [1, 2, 3]}))
    driver.run(batch=batch((4, 12)))  # overwrites the old blocks
    resumed = new_rows({"row": 1, "tokens": PROMPT, "blocks": [20, 21, 22], "computed": 8})
    tokens = driver.run(
        new_rows=resumed, swap_in=pb.BlockPairs(src=[5, 0], dst=[21, 20]), batch=batch((1, 1))
    ).token_ids
    assert list(tokens) == list(first)


def test_forks_and_inputs_play_a_beam_search(driver: Driver) -> None:
    """Width 2, by hand: each step keeps two of the four best continuations."""
    driven = {"flags": pb.ROW_FLAG_DRIVEN, "num_candidates": 2}
    result = driver.run(new_rows=begin(0, **driven), batch=batch((0, 9)))
    beams = [[token] for token in result.candidate_token_ids]
    result = driver.run(
        copy=pb.BlockPairs(src=[2], dst=[30]),
        forks=pb.Forks(src_rows=[0], dst_rows=[1], tail_dst_block_ids=[30]),
        inputs=pb.Inputs(rows=[0, 1], token_ids=[beams[0][0], beams[1][0]]),
        batch=batch((0, 1), (1, 1), num_decode_rows=2),
    )
    for beam, row in ((beams[0], 0), (beams[1], 1)):
        ids, logprobs = candidates(context_of([*PROMPT, *beam])[0], 2, VOCAB)
        assert list(result.candidate_token_ids[2 * row : 2 * row + 2]) == ids.tolist()
        assert list(result.candidate_logprobs[2 * row : 2 * row + 2]) == logprobs.tolist()
    # Both survivors come from row 1; row 0 becomes its fork.
    survivors = [[*beams[1], token] for token in result.candidate_token_ids[2:]]
    result = driver.run(
        copy=pb.BlockPairs(src=[30], dst=[2]),
        forks=pb.Forks(src_rows=[1], dst_rows=[0], tail_dst_block_ids=[2]),
        inputs=pb.Inputs(rows=[0, 1], token_ids=[beam[-1] for beam in survivors]),
        batch=pb.Batch(same=True),
    )
    for row, beam in enumerate(survivors):
        ids, _ = candidates(context_of([*PROMPT, *beam])[0], 2, VOCAB)
        assert list(result.candidate_token_ids[2 * row : 2 * row + 2]) == ids.tolist()


def test_candidates_agree_with_sampling() -> None:
    context = context_of(PROMPT)
    ids, logprobs = candidates(context[0], 64, VOCAB)
    assert ids[0] == next_tokens(context, SamplingParams().columns(), VOCAB)[0]
    assert len(set(ids.tolist())) == 64
    assert np.all(np.diff(logprobs) < 0)
    assert [token_logprob(context[0], i, VOCAB) for i in ids[:3]] == logprobs[:3].tolist()
    assert len(candidates(context[0], 64, 10)[0]) == 10


def test_rows_fail_alone() -> None:
    driver = Driver(FakeOptions(nan_seeds=frozenset({13})))
    rows = new_rows(
        {"row": 0, "tokens": [1], "blocks": [1], "seeds": 13},
        {"row": 1, "tokens": PROMPT, "blocks": [2, 3, 4]},
    )
    result = driver.run(new_rows=rows, batch=batch((0, 1), (1, 9)))
    assert list(result.failed_rows) == [0]
    assert list(result.failed_status) == [pb.ROW_STATUS_NUMERIC]
    assert result.token_ids[1] == reference_output(PROMPT, 1, VOCAB)[0]


def test_a_window_of_two(driver: Driver) -> None:
    executor = driver.executor
    plans = [
        pb.StepPlan(new_rows=begin(0), batch=batch((0, 9))),
        *[pb.StepPlan(batch=pb.Batch(same=True)) for _ in range(2)],
    ]
    for step_id, plan in enumerate(plans, start=1):
        plan.epoch, plan.step_id = executor.epoch, step_id
        executor.launch(plan)
    assert executor.num_in_flight == 3
    tokens = [executor.complete().token_ids[0] for _ in plans]
    assert tokens == reference_output(PROMPT, 3, VOCAB)


def test_tokens_without_content() -> None:
    driver = Driver(FakeOptions(check_content=False))
    first = driver.run(new_rows=begin(0, seeds=4), batch=batch((0, 9))).token_ids
    params = SamplingParams(seed=4)
    expected = reference_output(PROMPT, 5, VOCAB, params, check_content=False)
    assert [*first, *driver.decode(0, 4, [7])] == expected


def test_a_refused_plan_changes_nothing(driver: Driver) -> None:
    driver.run(new_rows=begin(0), batch=batch((0, 9)))
    with pytest.raises(PlanError, match="row is live"):
        driver.run(new_rows=begin(0), batch=batch((0, 9)))
    driver.step_id -= 1
    with pytest.raises(PlanError, match="gap"):
        driver.executor.run(pb.StepPlan(epoch=driver.executor.epoch, step_id=driver.step_id + 2))
    with pytest.raises(PlanError, match="epoch"):
        driver.executor.run(pb.StepPlan(epoch=1, step_id=driver.step_id + 1))
    assert driver.decode(0, 2, [7]) == reference_output(PROMPT, 3, VOCAB)[1:]


def test_a_new_epoch_holds_nothing_of_the_old_one(driver: Driver) -> None:
    driver.run(new_rows=begin(0), batch=batch((0, 9)))
    driver.executor.begin_epoch()
    driver.step_id = 0
    stale = new_rows({"row": 0, "tokens": PROMPT, "blocks": [3, 1, 2], "computed": 8})
    tokens = driver.run(new_rows=stale, batch=batch((0, 1))).token_ids
    assert list(tokens) != reference_output(PROMPT, 1, VOCAB)


# Known bug shapes, at the level of blocks: each must change what comes out.


def _never_written(driver: Driver) -> list[int]:
    rows = new_rows({"row": 0, "tokens": PROMPT, "blocks": [1, 2, 3], "computed": 4})
    return list(driver.run(new_rows=rows, batch=batch((0, 5))).token_ids)


def _blocks_exchanged(driver: Driver) -> list[int]:
    driver.run(new_rows=new_rows({"row": 0, "tokens": PROMPT[:8], "blocks": [1, 2]}))
    driver.run(batch=batch((0, 8)))
    rows = new_rows({"row": 1, "tokens": PROMPT, "blocks": [2, 1, 3], "computed": 8})
    return list(driver.run(new_rows=rows, batch=batch((1, 1))).token_ids)


def _released_in_use(driver: Driver) -> list[int]:
    driver.run(new_rows=begin(0), batch=batch((0, 8)))
    thief = new_rows({"row": 1, "tokens": [5, 6], "blocks": [1]})
    driver.run(new_rows=thief, batch=batch((1, 2)))
    return list(driver.run(batch=batch((0, 1))).token_ids)


def _stale_prefix(driver: Driver) -> list[int]:
    other = [*PROMPT[:3], PROMPT[3] ^ 1]
    driver.run(new_rows=new_rows({"row": 1, "tokens": other, "blocks": [1]}), batch=batch((1, 4)))
    rows = new_rows({"row": 0, "tokens": PROMPT, "blocks": [1, 2, 3], "computed": 4})
    return list(driver.run(new_rows=rows, batch=batch((0, 5))).token_ids)


def _swapped_in_from_the_wrong_block(driver: Driver) -> list[int]:
    driver.run(new_rows=begin(0), batch=batch((0, 9)))
    driver.run(swap_out=pb.BlockPairs(src=[3, 1], dst=[0, 1]), freed_rows=[0])
    rows = new_rows({"row": 0, "tokens": PROMPT, "blocks": [20, 21, 22], "computed": 8})
    swap_in = pb.BlockPairs(src=[1, 0], dst=[20, 21])
    return list(driver.run(new_rows=rows, swap_in=swap_in, batch=batch((0, 1))).token_ids)


BUGS = [
    _never_written,
    _blocks_exchanged,
    _released_in_use,
    _stale_prefix,
    _swapped_in_from_the_wrong_block,
]


@pytest.mark.parametrize("bug", BUGS)
def test_known_bug_shapes_change_the_output(bug: Callable[[Driver], list[int]]) -> None:
    assert bug(Driver()) != reference_output(PROMPT, 1, VOCAB)


def test_a_runner_that_keeps_no_kv_says_so() -> None:
    info = fake_info(9)
    assert FakeRunner(info).info.device == DEVICE
    assert FakeRunner(info, FakeOptions(check_content=False)).info.device != DEVICE

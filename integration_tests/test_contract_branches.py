"""Samples and beams on the wire: what the engine's plans say of branches that share blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from executor_svc.backends.checking.runner import FakeOptions, fake_info
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, RunnerInfo, StepBatch, StepOutputs
from integration_tests.engine_client import Output
from integration_tests.harness import RecordingRunner
from integration_tests.reference_beam import reference_beams
from integration_tests.stack import INFO, check_all, expected, prompt, stack, submit_many
from scheduler_svc.beam import BeamParams

WARM: Final = {"temperature": 0.7, "top_p": 1.0, "seed": 5}
HOST_INFO: Final = fake_info(
    17, 64, block_size=4, max_rows=8, max_model_len=64, max_num_batched_tokens=24
)


class WatchedStep:
    """A step that counts itself when it is done."""

    def __init__(self, step: PendingStep, runner: WatchingRunner) -> None:
        self._step, self._runner = step, runner

    def wait(self) -> StepOutputs:
        """See PendingStep.wait."""
        outputs = self._step.wait()
        self._runner.num_done += 1
        return outputs


class WatchingRunner(RecordingRunner):
    """Notes how many steps were done, and which rows were driven, when each plan was launched."""

    def __init__(self, info: RunnerInfo, options: FakeOptions | None = None) -> None:
        """As RecordingRunner."""
        super().__init__(info, options)
        self.num_done = 0
        self.launches: list[tuple[int, set[int], set[int]]] = []  # done, driven rows, other rows

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch."""
        is_driven = state.flags[batch.rows] & executor_pb2.ROW_FLAG_DRIVEN != 0
        driven, others = (set(batch.rows[chosen].tolist()) for chosen in (is_driven, ~is_driven))
        self.launches.append((self.num_done, driven, others))
        return WatchedStep(super().launch(plan, state, batch), self)


def check_samples(output: Output, ids: list[int], num_tokens: int, num_samples: int) -> None:
    """Each branch must have the tokens that its own random numbers give."""
    assert sorted(output.choices) == list(range(num_samples))
    for branch, choice in output.choices.items():
        assert choice.token_ids == expected(ids, num_tokens, **WARM, branch=branch)


def check_beams(output: Output, ids: list[int], num_tokens: int, params: BeamParams) -> None:
    """The hypotheses must be the reference's, best first."""
    wanted = reference_beams(ids, num_tokens, INFO.vocab_size, params, frozenset())
    assert sorted(output.choices) == list(range(params.num_returned))
    for branch, hypothesis in enumerate(wanted):
        choice = output.choices[branch]
        assert choice.token_ids == hypothesis.token_ids.tolist()
        assert choice.finish is not None
        assert choice.finish.score == pytest.approx(hypothesis.score)


def beams(params: BeamParams) -> dict[str, Any]:
    """Submit's field."""
    return {
        "beam": pb.BeamSearch(
            width=params.width,
            num_returned=params.num_returned,
            length_penalty=params.length_penalty,
        )
    }


def tables(plan: Plan) -> list[list[int]]:
    """The block tables of the plan's new rows."""
    ends = np.cumsum(plan.new_rows.block_counts)[:-1]
    return [ids.tolist() for ids in np.split(plan.new_rows.block_ids, ends)]


# ---- rule 12


@pytest.mark.parametrize("window", [1, 2, 3])
async def test_beams_are_planned_only_when_their_last_result_is_committed(
    window: int, tmp_path: Path
) -> None:
    ids, params = prompt(1, 6), BeamParams(3, 2)
    options = FakeOptions(step_s=0.004)
    async with stack(tmp_path, options, runner_type=WatchingRunner, window=window) as system:
        output = system.client.submit(ids, 20, **beams(params))
        others = await submit_many(system.client, 6)
        await output.finished()
        await check_all(others)
        check_beams(output, ids, 20, params)
        runner = system.runner
        assert isinstance(runner, WatchingRunner)
        launches = runner.launches
    with_beams = [number for number, (_, driven, _) in enumerate(launches) if driven]
    for number, last in zip(with_beams[1:], with_beams, strict=False):
        assert launches[number][0] > last, "planned before the result came"
    num_in_flight = [number - num_done for number, (num_done, _, _) in enumerate(launches)]
    assert max(num_in_flight) == window - 1  # the others went ahead


async def test_beams_alone_run_with_one_plan_in_flight(tmp_path: Path) -> None:
    ids, params = prompt(2, 9), BeamParams(4, 4)
    options = FakeOptions(step_s=0.004)
    async with stack(tmp_path, options, runner_type=WatchingRunner, window=3) as system:
        output = system.client.submit(ids, 12, **beams(params))
        await output.finished()
        check_beams(output, ids, 12, params)
        plans = system.plans_with_rows()
        runner = system.runner
        assert isinstance(runner, WatchingRunner)
        assert [done for done, driven, _ in runner.launches if driven] == list(range(len(plans)))
    assert len(plans) == 12  # a token of each beam in every step
    for plan in plans[1:]:
        assert plan.input_rows.tolist() == plan.batch_rows.tolist() or plan.same_batch
        assert len(plan.input_rows) == params.width


async def test_a_fork_shares_full_blocks_and_copies_the_partial_one(tmp_path: Path) -> None:
    ids, params = prompt(3, 6), BeamParams(3, 1)
    async with stack(tmp_path) as system:
        output = system.client.submit(ids, 4, **beams(params))
        await output.finished()
        check_beams(output, ids, 4, params)
        first, second = system.plans_with_rows()[:2]
    [table] = tables(first)
    assert len(table) == 2
    # One beam of width three had a row; the other two come from it, with a copy of its tail each.
    assert second.fork_src_rows.tolist() == [first.new_rows.rows[0]] * 2
    tails = second.fork_tail_dst_block_ids.tolist()
    assert len({*tails, *table}) == 4
    assert second.copy.src.tolist() == [table[1]] * 2
    assert second.copy.dst.tolist() == tails


# ---- rule 13


async def test_samples_begin_with_the_logits_and_blocks_of_the_first(tmp_path: Path) -> None:
    ids = prompt(4, 30)  # two chunks; seven full blocks and a partial one
    async with stack(tmp_path) as system:
        output = system.client.submit(ids, 12, num_samples=3, **WARM)
        await output.finished()
        check_samples(output, ids, 12, 3)
        first, second, third = system.plans_with_rows()[:3]
    assert first.new_rows.rows.tolist() == [0]
    assert not first.new_rows.logits_from.any()
    new = second.new_rows
    assert new.branches.tolist() == [1, 2]
    assert new.logits_from.tolist() == [1, 1]
    assert new.num_computed_tokens.tolist() == new.num_tokens.tolist() == [30, 30]
    assert not new.token_ids.size
    leader = [*tables(first)[0], *second.append_block_ids.tolist()]
    samples = tables(second)
    assert [table[:7] for table in samples] == [leader[:7]] * 2
    tails = [table[7] for table in samples]
    assert len({*tails, *leader}) == 10
    # The partial block is copied once the step that fills it has run, before the first write.
    assert not second.copy.src.size
    assert third.copy.src.tolist() == [leader[7]] * 2
    assert third.copy.dst.tolist() == tails
    assert sorted(third.batch_rows.tolist()) == [0, *sorted(new.rows.tolist())]


async def test_samples_of_a_prompt_without_a_partial_block_copy_nothing(tmp_path: Path) -> None:
    ids = prompt(5, 8)
    async with stack(tmp_path) as system:
        output = system.client.submit(ids, 9, num_samples=4, **WARM)
        await output.finished()
        check_samples(output, ids, 9, 4)
        plans = system.plans_with_rows()
    assert tables(plans[0]) == [tables(plans[0])[0]] * 4
    assert not any(plan.copy.src.size for plan in plans)
    assert len(set(plans[1].append_block_ids.tolist())) == 4  # each goes on in its own


async def test_a_sample_that_finds_no_row_computes_only_what_is_not_cached(tmp_path: Path) -> None:
    ids = prompt(6, 10)
    async with stack(tmp_path, max_num_seqs=2) as system:
        output = system.client.submit(ids, 5, num_samples=2, **WARM)
        other = system.client.submit(prompt(7, 3), 8)
        third = system.client.submit(ids, 5, num_samples=2, **{**WARM, "seed": 6})
        for each in (output, other, third):
            await each.finished()
        check_samples(output, ids, 5, 2)
        plans = [plan for plan in system.plans_with_rows() if plan.new_rows.rows.size]
    late = [plan.new_rows for plan in plans if plan.new_rows.branches.any()][-1]
    assert late.branches.tolist() == [1]
    assert not late.logits_from.any()
    assert late.num_computed_tokens.tolist() == [8]


async def test_a_sample_that_ends_frees_its_row_alone(tmp_path: Path) -> None:
    ids = prompt(8, 6)
    stop = expected(ids, 20, **WARM, branch=1)[4]
    async with stack(tmp_path, FakeOptions(step_s=0.002), window=1) as system:
        output = system.client.submit(ids, 20, num_samples=2, stop_token_ids=[stop], **WARM)
        await output.finished()
        plans = system.plans_with_rows()
        second = output.choices[1].finish
        assert second is not None
        assert (second.reason, second.stop_token_id) == (pb.FINISH_REASON_STOP, stop)
        assert output.choices[1].token_ids == expected(ids, 5, **WARM, branch=1)
        assert output.choices[0].token_ids == expected(ids, 20, **WARM, branch=0)
    row = plans[0].new_rows.rows.tolist()[1]
    freeing = [plan for plan in plans if plan.freed_rows.size]
    assert [plan.freed_rows.tolist() for plan in freeing] == [[row]]


# ---- swapping


@pytest.mark.parametrize("window", [1, 3])
async def test_swapped_branches_come_back_with_their_blocks(window: int, tmp_path: Path) -> None:
    up = stack(
        *(tmp_path, FakeOptions(step_s=0.001)), info=HOST_INFO, preemption="swap", window=window
    )
    async with up as system:
        requests = await submit_many(system.client, 16)
        ids = prompt(9, 10)
        output = system.client.submit(ids, 20, num_samples=3, **WARM)
        await check_all(requests)
        await output.finished()
        check_samples(output, ids, 20, 3)
        counters = (await system.client.idle()).counters
        plans = system.runner.plans
    assert counters.num_preemptions_by_swap > 0
    assert counters.num_swapped_out == sum(plan.swap_out.src.size for plan in plans) > 0
    assert counters.num_swapped_in == sum(plan.swap_in.src.size for plan in plans) > 0
    written: set[int] = set()
    for plan in plans:
        # What comes back was saved by an earlier plan, and goes to blocks of rows that begin.
        assert set(plan.swap_in.src.tolist()) <= written
        assert set(plan.swap_in.dst.tolist()) <= set(plan.new_rows.block_ids.tolist())
        written |= set(plan.swap_out.dst.tolist())


async def test_without_host_blocks_swapping_means_recomputing(tmp_path: Path) -> None:
    info = dataclasses.replace(HOST_INFO, num_host_blocks=0)
    async with stack(tmp_path, info=info, preemption="swap") as system:
        await check_all(await submit_many(system.client, 16))
        counters = (await system.client.idle()).counters
    assert counters.num_preemptions_by_recompute > 0
    assert counters.num_preemptions_by_swap == counters.num_swapped_out == 0

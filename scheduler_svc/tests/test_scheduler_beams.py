"""Scenarios of beam searches: lanes, forks, inputs, results, company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scheduler_svc.beam import BeamParams, EarlyStopping
from scheduler_svc.request import Request, RequestStatus, Sampling
from scheduler_svc.tests.driver import EOS, PARTING, TOKEN, WIDTH_2, Driver, admitted, go_on


def begun(num_prompt_tokens: int = 6, max_tokens: int = 8, **fields: Any) -> tuple[Driver, Request]:
    """A search of two beams, 50 in lane 0 and 51 in lane 1, whose next plan may be made."""
    driver = Driver()
    request = driver.submit(num_prompt_tokens, max_tokens, **{"beam": WIDTH_2, **fields})
    driver.plan()
    driver.commit(scores=PARTING)
    return driver, request


# ---- one step


def test_the_prompt_is_computed_once_in_the_first_lane() -> None:
    driver = Driver()
    request = driver.submit(6, beam=WIDTH_2)
    plan = driver.plan()
    (new,) = plan.new_rows
    assert (new.branch, new.num_candidates) == (request.branches[0], 3)  # two, and a stop token
    assert len(driver.scheduler.running) == 2
    assert driver.try_plan() is None  # the next input is not decided
    assert driver.scheduler.has_beams_in_flight


def test_the_other_lanes_fork_from_it() -> None:
    driver, request = begun()
    plan = driver.plan()
    first, second = (driver.scheduler.kv.table(branch.row).tolist() for branch in request.branches)
    assert plan.forks == [(0, 1, second[1])]
    assert plan.moves.copy == [(first[1], second[1])]
    assert first[0] == second[0]
    assert plan.inputs == [(0, 50), (1, 51)]
    assert (plan.rows.tolist(), plan.num_decode_rows, plan.append_rows) == ([0, 1], 2, [])
    assert driver.try_plan() is None
    assert (request.blocks.num_shared, request.blocks.num_copied) == (1, 1)


def test_lanes_that_part_at_a_block_boundary_copy_nothing() -> None:
    driver, request = begun(8)
    plan = driver.plan()
    assert plan.forks == [(0, 1, 0)]
    assert not plan.moves
    assert (plan.append_rows, plan.append_counts) == ([0, 1], [1, 1])
    assert request.blocks.num_shared == 2


def test_beams_that_change_rank_keep_their_lanes() -> None:
    driver, _ = begun()
    driver.plan()
    driver.commit(scores=[{60: -5.0}, {61: -0.1}])
    plan = driver.plan()
    assert (plan.forks, plan.moves.copy) == ([], [])
    assert plan.inputs == [(1, 61), (0, 60)]
    assert plan.rows.tolist() == [1, 0]


def test_a_lane_without_a_successor_gives_its_blocks_back_at_once() -> None:
    driver, request = begun()
    driver.plan()
    before = driver.scheduler.kv.pool.num_free
    driver.commit(scores=[{60: -0.1, 61: -0.2}, {62: -30.0}])
    lane = request.branches[1]
    assert driver.scheduler.kv.num_blocks[lane.row] == 0
    assert driver.scheduler.kv.pool.num_free == before + 1
    plan = driver.plan()
    assert [fork[:2] for fork in plan.forks] == [(0, 1)]
    assert plan.inputs == [(0, 60), (1, 61)]


def test_forks_never_read_a_lane_that_they_write() -> None:
    driver = Driver()
    driver.submit(6, beam=BeamParams(3))
    driver.plan()
    driver.commit(scores=[{50: -1.0, 51: -2.0, 52: -3.0}])
    driver.plan()
    # The worst beam has two successors, the best one has one, the other one none.
    driver.commit(scores=[{60: -5.0}, {61: -30.0}, {62: -0.1, 63: -0.2}])
    plan = driver.plan()
    assert [fork[:2] for fork in plan.forks] == [(2, 1)]
    assert plan.inputs == [(2, 62), (1, 63), (0, 60)]


def test_a_single_beam_is_a_greedy_search() -> None:
    driver = Driver()
    request = driver.submit(6, max_tokens=3, beam=BeamParams(1))
    plans = driver.run_dry()
    assert not any(plan.forks for plan in plans)
    assert request.branches[0].status is RequestStatus.FINISHED_STOP  # lanes end together
    assert driver.scheduler.snapshot().counters.num_output_tokens == 3


# ---- results


def test_hypotheses_come_best_first_with_all_their_tokens() -> None:
    driver, request = begun(max_tokens=2)
    driver.plan()
    output = driver.commit(scores=[{60: -1.0}, {61: -0.5}])
    assert output.branches.tolist() == [0, 0, 1, 1]
    assert output.token_ids.tolist() == [50, 60, 51, 61]
    assert not output.is_one_each
    assert [(f.branch, f.num_output_tokens, f.is_last) for f in output.finished] == [
        (0, 2, False),
        (1, 2, True),
    ]
    assert [f.score for f in output.finished] == [-1.0, -1.25]
    assert all(f.status is RequestStatus.FINISHED_LENGTH for f in output.finished)
    assert driver.scheduler.snapshot().counters.num_finished == 1
    assert request.is_finished
    driver.run_dry()


def test_tokens_that_are_certain_stream_before_the_end() -> None:
    driver, _ = begun(max_tokens=3)
    driver.plan()
    output = driver.commit(scores=[{60: -0.1, 61: -0.2}, {62: -30.0}])
    assert (output.branches.tolist(), output.token_ids.tolist()) == ([0], [50])
    driver.plan()
    output = driver.commit(scores=[{70: -0.1}, {71: -0.1}])
    assert output.branches.tolist() == [0, 0, 1, 1, 1]
    assert output.token_ids.tolist() == [60, 70, 50, 61, 71]


def test_a_stop_token_ends_a_hypothesis_not_the_search() -> None:
    driver = Driver()
    request = driver.submit(6, beam=WIDTH_2)
    driver.plan()
    assert not driver.commit(scores=[{EOS: -0.1, 50: -1.0, 51: -2.0}]).finished
    assert driver.plan().inputs == [(0, 50), (1, 51)]
    output = driver.commit(scores=[{EOS: -0.1}, {60: -9.0}])
    assert [(f.stop_token_id, f.status) for f in output.finished] == [
        (EOS, RequestStatus.FINISHED_STOP),
        (EOS, RequestStatus.FINISHED_STOP),
    ]
    assert output.token_ids.tolist() == [EOS, 50, EOS]
    assert request.is_finished


def test_a_stop_string_ends_a_hypothesis_without_a_stop_token() -> None:
    def is_stopped(token_ids: np.ndarray) -> bool:
        return bool(token_ids.tolist()[-2:] == [50, 60])

    beam = BeamParams(2, early_stopping=EarlyStopping.AT_WIDTH)
    driver = Driver()
    driver.submit(6, max_tokens=3, beam=beam, is_text_stopped=is_stopped)
    plan = driver.plan()
    assert plan.new_rows[0].num_candidates == 4  # all that a step looks at
    driver.commit(scores=PARTING)
    driver.plan()
    driver.commit(scores=[{60: -0.1, 61: -0.2}, {60: -0.1}])
    driver.plan()
    output = driver.commit(scores=[{70: -30.0}, {70: -30.0}])
    (finished,) = output.finished
    assert (finished.status, finished.stop_token_id) == (RequestStatus.FINISHED_STOP, None)
    assert output.token_ids.tolist() == [50, 60]


def test_log_probabilities_are_of_the_hypothesis_own_tokens() -> None:
    driver, _ = begun(max_tokens=2, sampling=Sampling(num_logprobs=1))
    driver.plan()
    output = driver.commit(scores=[{60: -1.0}, {61: -0.5}])
    values = [output.logprobs[i] for i in range(4)]
    assert [each.logprob for each in values] == [-1.0, -1.0, -2.0, -0.5]
    assert not any(len(each.candidate_token_ids) for each in values)


def test_rows_that_the_executor_never_met_are_not_freed() -> None:
    driver = Driver()
    driver.submit(6, max_tokens=1, beam=WIDTH_2)
    driver.step()
    assert driver.plan().freed_rows == [0]
    assert driver.scheduler.rows.num_free == 4


def test_a_search_ends_with_all_its_rows() -> None:
    driver, request = begun()
    driver.plan()
    driver.scheduler.abort(request)
    assert not len(driver.commit().token_ids)
    assert sorted(driver.plan().freed_rows) == [0, 1]
    assert all(b.status is RequestStatus.FINISHED_ABORTED for b in request.branches)


@pytest.mark.parametrize("lane", [0, 1])
def test_a_failed_lane_fails_the_search_and_nobody_else(lane: int) -> None:
    driver, request = begun()
    plain = driver.submit(4)
    driver.plan()
    output = driver.commit(scores=[{60: -1.0}, {61: -1.0}], failed_rows=[lane])
    (finished,) = output.finished
    assert (finished.request, finished.status) == (request, RequestStatus.FINISHED_ERROR)
    assert finished.is_last
    assert output.request_ids.tolist() == [plain.request_id]
    driver.run_dry()


# ---- beside other requests


def test_a_search_sits_out_while_its_result_is_under_way() -> None:
    driver, _ = begun()
    plain = driver.submit(4)
    joint = driver.plan()
    row = plain.branches[0].row
    assert joint.rows.tolist() == [0, 1, row]
    waits = [driver.scheduler.has_beams_in_flight]
    alone = driver.plan()
    assert alone.rows.tolist() == [row]
    go_on(driver)
    waits.append(driver.scheduler.has_beams_in_flight)
    assert waits == [True, False]
    again = driver.plan()
    assert (again.rows.tolist(), again.num_decode_rows) == ([row, 0, 1], 3)
    assert [row for row, _ in again.inputs] == [0, 1]
    assert not again.same_batch
    driver.commit()
    go_on(driver)
    assert driver.plan().same_batch


def test_candidates_find_their_lanes_beside_rows_that_ask_for_none() -> None:
    driver, _ = begun(max_tokens=3)
    plain = driver.submit(4, sampling=Sampling(num_logprobs=2))
    silent = driver.submit(4)
    for _ in range(2):
        plan = driver.plan()
        go_on(driver)
    plan = driver.plan()
    rows = [plain.branches[0].row, silent.branches[0].row]
    assert plan.rows.tolist() == rows
    assert plan.num_candidates is not None
    assert plan.num_candidates.tolist() == [1, 0]
    output = driver.commit(scores=[{90: -0.3}])
    assert list(output.logprobs) == [0]
    assert output.logprobs[0].candidate_token_ids.tolist() == [90]


def test_log_probabilities_find_their_tokens_behind_those_of_a_search() -> None:
    driver, _ = begun(max_tokens=3)
    plain = driver.submit(4, sampling=Sampling(num_logprobs=1))
    driver.plan()
    output = driver.commit(scores=[{60: -0.1, 61: -0.2}, {62: -30.0}, {90: -0.3}])
    assert output.token_ids.tolist() == [50, TOKEN]
    assert output.request_ids.tolist()[1] == plain.request_id
    assert list(output.logprobs) == [1]


def test_a_search_enters_with_all_its_rows_or_not_at_all() -> None:
    driver = Driver(max_num_seqs=3)
    driver.submit(4, max_tokens=3)
    driver.submit(4, max_tokens=3)
    search = driver.submit(4, beam=WIDTH_2)
    later = driver.submit(4)
    assert search not in admitted(driver.step())
    assert list(driver.scheduler.waiting) == [search.branches[0], later.branches[0]]
    driver.run_dry()
    assert search.is_finished


def test_a_search_enters_only_if_its_next_step_fits() -> None:
    driver = Driver(num_device_blocks=8, max_model_len=29, max_num_batched_tokens=32)
    driver.submit(13, max_tokens=2)  # four blocks of seven
    search = driver.submit(8, max_tokens=4, beam=WIDTH_2)  # two, and one for each beam
    assert search not in admitted(driver.step())
    driver.run_dry()

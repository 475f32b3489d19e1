"""The search against a plain one that looks at every token of every beam."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.beam import (
    MAX_CANDIDATES,
    BeamParams,
    BeamSearch,
    EarlyStopping,
    Hypothesis,
    TokenIds,
)
from scheduler_svc.tests.beam_oracle import PROMPT, Case, Oracle, Sequence, Toy


def outputs(hypotheses: list[Hypothesis]) -> list[Sequence]:
    return [tuple(h.token_ids.tolist()) for h in hypotheses]


def assert_equal(search: BeamSearch, oracle: Oracle) -> None:
    """Same results, scores, log-probabilities and reasons."""
    expected = oracle.finished[: oracle.params.num_returned]
    results = search.results()
    assert outputs(results) == [output for _, output in expected]
    for result, (score, output) in zip(results, expected, strict=True):
        assert result.score == pytest.approx(score, rel=1e-6)
        own = [oracle.toy.next(output[:n])[output[n]] for n in range(len(output))]
        assert result.logprobs.tolist() == own
        assert result.is_stopped == oracle.stops(output)


def run(case: Case) -> tuple[BeamSearch, Oracle]:
    search, oracle = case.search, case.oracle
    while not oracle.is_done:
        oracle.step()
        case.advance(search)
        assert search.is_done == oracle.is_done
    return search, oracle


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = draw(st.integers(1, 12) | st.just(32))
    vocab_size = draw(st.integers(3, 24) | st.just(80))
    num_stop_ids = draw(st.integers(0, min(5, vocab_size - 1)))
    stop_ids = frozenset(range(0, vocab_size, -(-vocab_size // max(1, num_stop_ids))))
    stop_ids = stop_ids if num_stop_ids else frozenset()
    params = BeamParams(
        width=width,
        num_returned=draw(st.integers(1, width)),
        length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 2.0, -1.0, 20.0])),
        early_stopping=draw(st.sampled_from(EarlyStopping)),
    )
    return Case(
        Toy.random(draw(st.integers(0, 2**32)), vocab_size, stop_ids),
        params,
        max_output=draw(st.integers(1, 14)),
        stop_ids=stop_ids,
        stop_modulus=draw(st.none() | st.integers(1, 9)),
    )


# Input that is not allowed.


@pytest.mark.parametrize(
    ("width", "num_returned", "length_penalty"),
    [
        *((0, 1, 1.0), (33, 1, 1.0), (4, 0, 1.0), (4, 5, 1.0)),
        *((4, 1, math.nan), (4, 1, math.inf), (4, 1, -math.inf)),
    ],
)
def test_impossible_parameters(width: int, num_returned: int, length_penalty: float) -> None:
    with pytest.raises(AssertionError):
        BeamParams(width, num_returned, length_penalty)


def test_nothing_may_be_generated() -> None:
    with pytest.raises(AssertionError):
        BeamSearch(BeamParams(2), 5, 5, frozenset())


def search_of(width: int = 2, max_output: int = 3) -> tuple[Case, BeamSearch]:
    case = Case(Toy.random(1, 9), BeamParams(width, width), max_output)
    return case, case.search


def test_one_row_is_missing() -> None:
    case, search = search_of()
    case.advance(search)
    row = np.zeros(2, np.int32), np.zeros(2, np.float32)
    with pytest.raises(AssertionError):
        search.advance([row[0]], [row[1]])


def test_all_candidates_are_impossible() -> None:
    _, search = search_of()
    with pytest.raises(AssertionError, match="no beam has a candidate"):
        search.advance([np.zeros(2, np.int32)], [np.full(2, -np.inf, np.float32)])


def test_results_before_the_end_and_steps_after_it() -> None:
    case, search = search_of(max_output=1)
    with pytest.raises(AssertionError, match="goes on"):
        search.results()
    assert case.advance(search) == []
    with pytest.raises(AssertionError):
        search.advance([], [])
    with pytest.raises(AssertionError):
        search.output_ids(0)


def test_shorten_to_the_prompt() -> None:
    _, search = search_of()
    with pytest.raises(AssertionError):
        search.shorten(PROMPT)


@pytest.mark.parametrize("length_penalty", [1e6, -1e6])
def test_an_absurd_length_penalty_stays_finite(length_penalty: float) -> None:
    params = BeamParams(3, 3, length_penalty)
    case = Case(Toy.random(5, 9, frozenset({1})), params, 6, frozenset({1}))
    search = case.search
    while not search.is_done:
        case.advance(search)
    assert all(math.isfinite(result.score) for result in search.results())


# What is chosen.


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_a_search_over_everything(case: Case) -> None:
    search, oracle = run(case)
    assert_equal(search, oracle)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_beams_are_those_of_a_search_over_everything(case: Case) -> None:
    search, oracle = case.search, case.oracle
    assert search.num_beams == 1
    old = [search.output_ids(0).tolist()]
    while parents := case.advance(search):
        oracle.step()
        assert len(parents) == search.num_beams == case.params.width
        new = [search.output_ids(beam).tolist() for beam in range(search.num_beams)]
        alive = [list(output) for _, output in oracle.running]
        assert new[: len(alive)] == alive
        for output, parent, last in zip(new, parents, search.last_token_ids, strict=True):
            assert len(output) == search.num_output_tokens
            assert output == [*old[parent], last]
        old = new
    assert search.is_done
    assert search.num_beams == 0


def prefixes(search: BeamSearch, case: Case) -> Iterator[tuple[TokenIds, Sequence]]:
    """After each step: the stable prefix, and what it should be."""
    oracle = case.oracle
    while not search.is_done:
        case.advance(search)
        oracle.step()
        possible = [output for _, output in (oracle.finished[:1] + oracle.running)]
        if oracle.is_done:
            possible = [oracle.finished[0][1]]
        shared = 0
        while all(len(o) > shared and o[shared] == possible[0][shared] for o in possible):
            shared += 1
        yield search.stable_prefix(), possible[0][:shared]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_stable_prefix_is_the_longest_and_never_changes(case: Case) -> None:
    search = case.search
    seen: list[tuple[TokenIds, Sequence]] = []
    logprobs: list[float] = []
    for prefix, longest in prefixes(search, case):
        # Idle beams may hold it back while they are.
        assert tuple(prefix.tolist()) == longest[: len(prefix)]
        if case.stop_modulus is None and case.toy.logprobs.shape[-1] > 2 * case.params.width:
            assert len(prefix) == len(longest)
        seen.append((prefix, tuple(prefix.tolist())))
        if not search.is_done:
            assert search.stable_logprobs()[: len(logprobs)].tolist() == logprobs
            logprobs = search.stable_logprobs().tolist()
            assert len(logprobs) == len(prefix)
    assert search.results()[0].logprobs[: len(logprobs)].tolist() == logprobs
    final = seen[-1][1]
    lengths = [len(now) for _, now in seen]
    assert lengths == sorted(lengths)
    for prefix, then in seen:
        assert tuple(prefix.tolist()) == then == final[: len(then)]


def test_stable_prefix_cannot_be_written() -> None:
    case, search = search_of()
    case.advance(search)
    for array in (search.stable_prefix(), search.stable_logprobs()):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_a_certain_token_is_stable_at_once() -> None:
    logprobs = np.full((1, 6, 5), -9, np.float32)
    logprobs[0, -1] = [0, -99, -99, -99, -99]
    case = Case(Toy(logprobs), BeamParams(2), 8)
    search = case.search
    lengths = []
    for _ in range(3):
        case.advance(search)
        lengths.append(len(search.stable_prefix()))
    assert lengths[0] == 0, "the second beam still holds another token"
    assert lengths[1] >= 1


# How many candidates.


@pytest.mark.parametrize(
    ("width", "num_stop_tokens", "has_stop_strings", "expected"),
    [
        *((4, 0, False, 4), (4, 1, False, 5), (32, 32, False, 64), (32, 256, False, 64)),
        *((4, 0, True, 8), (4, 1, True, 8), (4, 2, True, 12), (32, 3, True, 64)),
    ],
)
def test_num_candidates(
    width: int, num_stop_tokens: int, has_stop_strings: bool, expected: int
) -> None:
    params = BeamParams(width)
    assert params.num_candidates(num_stop_tokens, has_stop_strings=has_stop_strings) == expected


def test_one_candidate_less_is_too_few() -> None:
    """One beam has all the best tokens, and its very best ones stop."""
    order = np.arange(12, dtype=np.float32)
    logprobs = np.stack([-order - 50, -order / 100])  # beam 1 lives on, if at all, at its end
    stop_ids = frozenset({0, 1})
    found = []
    for num_candidates in (5, 4):
        search = BeamSearch(BeamParams(3), PROMPT, PROMPT + 9, stop_ids)
        search.advance([np.array([5, 6, 7])], [np.array([0, -20, -40], np.float32)])
        rows = [logprobs[1], logprobs[0], logprobs[0]]
        ids = [np.arange(num_candidates, dtype=np.int32)] * 3
        search.advance(ids, [row[:num_candidates] for row in rows])
        found.append([search.output_ids(beam).tolist() for beam in range(3)])
    assert found[0] == [[5, 2], [5, 3], [5, 4]]
    assert found[1] != found[0]


@pytest.mark.parametrize("early_stopping", EarlyStopping)
def test_more_stop_tokens_than_the_cap_allows_for(early_stopping: EarlyStopping) -> None:
    params = BeamParams(32, 32, early_stopping=early_stopping)
    stop_ids = frozenset(range(0, 400, 4))
    assert params.num_candidates(len(stop_ids)) == MAX_CANDIDATES
    assert_equal(*run(Case(Toy.random(7, 400), params, 10, stop_ids)))


def test_beams_stay_when_nearly_everything_stops() -> None:
    """Of the 64 candidates of the only row, 40 stop: 24 beams live and 8 are idle."""
    params = BeamParams(32, 32)
    stop_ids = frozenset(range(24, 64))
    row = -np.arange(100, dtype=np.float32) / 10
    case = Case(Toy(np.broadcast_to(row, (1, 101, 100))), params, 4, stop_ids)
    search = case.search
    assert len(case.advance(search)) == 32
    assert search.last_token_ids.tolist() == [*range(24), *[0] * 8]
    parents = case.advance(search)
    assert max(parents) < 24, "nothing comes of an idle beam"
    beams = {tuple(search.output_ids(beam).tolist()) for beam in range(32)}
    assert len(beams) == 32, "all live again"


def test_everything_stops() -> None:
    case = Case(Toy.random(3, 8), BeamParams(3, 3), 9, frozenset(range(8)))
    search, oracle = run(case)
    assert [len(output) for output in outputs(search.results())] == [1, 1, 1]
    assert_equal(search, oracle)


def test_a_step_looks_at_the_joint_best_alone() -> None:
    params = BeamParams(2, early_stopping=EarlyStopping.NEVER)
    search = BeamSearch(params, PROMPT, PROMPT + 99, frozenset(), lambda ids: bool(ids[-1] < 4))
    search.advance([np.arange(6, dtype=np.int32)], [-np.arange(6, dtype=np.float32)])
    assert search.is_done, "all of the best 4 stop, so it is over although 4 and 5 do not"


def test_impossible_tokens_are_never_chosen() -> None:
    row = np.array([-0.1, -3.0, -np.inf, -np.inf], np.float32)
    case = Case(Toy(np.broadcast_to(row, (1, 5, 4))), BeamParams(4, 4), 3)
    search = case.search
    while not search.is_done:
        case.advance(search, num_candidates=4)
    assert len(search.results()) == 4
    assert {token for output in outputs(search.results()) for token in output} == {0, 1}


# Ties.


def test_equal_candidates_go_by_beam_then_by_their_order() -> None:
    search = BeamSearch(BeamParams(3), PROMPT, PROMPT + 9, frozenset())
    assert search.advance([np.array([7, 5, 6])], [np.zeros(3, np.float32)]) == [0, 0, 0]
    assert search.last_token_ids.tolist() == [7, 5, 6]
    parents = search.advance([np.array([2, 1, 3])] * 3, [np.zeros(3, np.float32)] * 3)
    assert parents == [0, 0, 0]
    assert search.last_token_ids.tolist() == [2, 1, 3]


def test_the_older_of_equal_hypotheses_goes_first() -> None:
    params = BeamParams(2, 2, length_penalty=0.0)
    search = BeamSearch(params, PROMPT, PROMPT + 9, frozenset({0}))
    rows = [np.array([0, 1, 2], np.int32)], [np.array([-1, -1, -2], np.float32)]
    search.advance(*rows)
    certain: npt.NDArray[np.float32] = np.array([0, -9], np.float32)
    search.advance([np.array([0, 1], np.int32)] * 2, [certain] * 2)
    assert outputs(search.results()) == [(0,), (1, 0)]
    assert [result.score for result in search.results()] == [-1.0, -1.0]


def test_a_live_beam_that_only_equals_the_worst_hypothesis_does_not_go_on() -> None:
    search = BeamSearch(BeamParams(1), PROMPT, PROMPT + 9, frozenset({0}))
    search.advance([np.array([0, 1])], [np.array([-1, -1], np.float32)])
    assert search.is_done


# A smaller executor.


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 14), st.integers(1, 14))
def test_shortened_equals_a_search_that_was_always_short(
    case: Case, num_steps: int, max_output: int
) -> None:
    search, always = case.search, case.oracle
    always.max_output = min(max_output, case.max_output)
    num_steps = min(num_steps, always.max_output)
    for _ in range(num_steps):
        if not search.is_done:
            case.advance(search)
    # What ended by itself stays as it is, and NEVER may have ended otherwise for the limit.
    is_same = not search.is_done or num_steps < always.max_output
    is_same &= case.params.early_stopping is not EarlyStopping.NEVER
    search.shorten(PROMPT + always.max_output)
    while not search.is_done:
        case.advance(search)
    while not always.is_done:
        always.step()
    assert max(map(len, outputs(search.results()))) <= always.max_output
    if is_same:
        assert_equal(search, always)


def test_shortened_below_what_it_has() -> None:
    case, search = search_of(width=3, max_output=9)
    for _ in range(4):
        case.advance(search)
    alive = [tuple(search.output_ids(beam).tolist()) for beam in range(3)]
    prefix = search.stable_prefix().tolist()
    search.shorten(PROMPT + 2)
    assert search.is_done
    assert outputs(search.results()) == alive, "tokens may have been sent: none is taken back"
    assert not any(result.is_stopped for result in search.results())
    assert search.stable_prefix()[: len(prefix)].tolist() == prefix


def test_shortened_ends_what_only_more_tokens_could_improve() -> None:
    params = BeamParams(1, length_penalty=1.0, early_stopping=EarlyStopping.NEVER)
    search = BeamSearch(params, PROMPT, PROMPT + 9, frozenset({0}))
    search.advance([np.array([0, 1])], [np.array([-1, -3], np.float32)])
    assert search.num_beams == 1, "-3 / 9 is better than -1 / 1"
    search.shorten(PROMPT + 3)
    assert search.is_done, "-3 / 3 is not"
    assert outputs(search.results()) == [(0,)]


def test_shorten_never_lengthens() -> None:
    case, search = search_of(max_output=3)
    search.shorten(PROMPT + 50)
    for _ in range(3):
        case.advance(search)
    assert search.is_done

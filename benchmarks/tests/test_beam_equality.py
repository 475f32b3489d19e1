from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.beam_equality import (
    Answer,
    Case,
    Difference,
    cases,
    chosen_prompts,
    difference,
    explain,
    targets,
)
from benchmarks.hf_peer import HfPeer
from blockyard.models import store

CASE = Case("p", [1, 2], width=2)
PLAIN = Answer([[5, 6, 7], [5, 6, 8]], [-0.5, -0.7])
OTHER = Answer([[5, 9, 9], [5, 6, 7]], [-0.4, -0.5])
BOUND = 1e-3


class FakePeer:
    """Finds PLAIN, or what the nudges lead to; each search has one close choice."""

    def __init__(self, outcomes: list[Answer]) -> None:
        self.outcomes = outcomes  # by number of nudges
        self.num_searches = 0

    async def beams(
        self,
        token_ids: list[int],
        options: dict[str, Any],
        bound: float | None,
        nudges: list[dict[str, Any]],
    ) -> dict[str, Any]:
        assert (token_ids, options, bound) == (CASE.token_ids, CASE.options, BOUND)
        self.num_searches += 1
        answer = self.outcomes[min(len(nudges), len(self.outcomes) - 1)]
        close = {"output_ids": [5] * len(nudges), "token_id": 9, "by": BOUND / 2}
        return {"sequences": answer.sequences, "scores": answer.scores, "close": [close]}


def moved(answer: Answer, by: float) -> Answer:
    return Answer(answer.sequences, [score + by for score in answer.scores])


def test_equal_answers() -> None:
    assert difference(CASE, PLAIN, moved(PLAIN, 9e-4)) is None


def test_a_score_too_far_off_and_one_that_never_came() -> None:
    for wrong in (moved(PLAIN, 2e-3), moved(PLAIN, float("nan"))):
        found = difference(CASE, PLAIN, wrong)
        assert found is not None
        assert found.choice == 0


def test_the_first_choice_that_differs() -> None:
    found = difference(CASE, PLAIN, Answer([[5, 6, 7], [5, 6]], PLAIN.scores))
    assert found is not None
    assert (found.choice, found.expected, found.got) == (1, [5, 6, 8], [5, 6])


@pytest.mark.parametrize(
    ("outcomes", "changes"),
    [
        ([PLAIN, OTHER], [BOUND / 2]),
        ([PLAIN, PLAIN, OTHER], [BOUND / 2] * 2),
        ([PLAIN], None),
        ([PLAIN, moved(OTHER, 0.01)], None),
    ],
)
async def test_a_tie_is_what_close_choices_lead_to(
    outcomes: list[Answer], changes: list[float] | None
) -> None:
    peer = FakePeer(outcomes)
    assert await explain(cast("HfPeer", peer), CASE, OTHER, BOUND) == changes
    assert peer.num_searches <= 4


@pytest.mark.parametrize(("apart", "is_tie"), [(0.9e-3, True), (1.1e-3, False)])
async def test_hypotheses_out_of_order_must_tie_in_total(apart: float, is_tie: bool) -> None:
    theirs = Answer([[5, 6, 7], [5, 6, 8]], [-0.5, -0.5 - apart / 3])
    ours = Answer(theirs.sequences[::-1], theirs.scores)
    found = await explain(cast("HfPeer", FakePeer([theirs])), CASE, ours, BOUND)
    assert found == ([] if is_tie else None)


def test_targets_tell_ties_from_errors() -> None:
    tie = Difference("s", "p", 0, [1], [2], 0.1, changes=[1e-4])
    wrong = Difference("s", "p", 0, [1], [2], 0.1)
    for differences, missed in (([tie], []), ([wrong], ["wrong searches"]), ([tie] * 2, ["ties"])):
        reached = targets([CASE] * 20, differences)
        assert [target.name for target in reached if not target.is_met] == missed


@pytest.mark.model
def test_all_searches() -> None:
    model_path: Path = store.resolve(store.DEFAULT_MODEL, is_quiet=True)
    token_ids = {prompt.name: [1] for prompt in chosen_prompts(model_path)}
    assert len(token_ids) == 40
    searches = cases(model_path, token_ids, is_quick=False)
    assert len(searches) == 3 * 40 + 6 * 10
    assert len({(case.setting, case.prompt) for case in searches}) == len(searches)
    assert len({case.early_stopping for case in cases(model_path, token_ids, is_quick=True)}) == 3

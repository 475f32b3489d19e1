from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.link import FrontendLink
from scheduler_svc.step_plan import Logprobs, StepOutput

LINK = 3

Entry = tuple[int, int, int]
"""Request id, branch, token."""


def step(
    *entries: Entry,
    frontend: int = LINK,
    logprobs: dict[int, Logprobs] | None = None,
    is_one_each: bool = True,
) -> StepOutput:
    """What a commit yields."""
    return StepOutput(
        np.full(len(entries), frontend, np.int32),
        np.array([request_id for request_id, _, _ in entries], np.uint64),
        np.array([branch for _, branch, _ in entries], np.int32),
        np.array([token for _, _, token in entries], np.int32),
        logprobs=logprobs or {},
        is_one_each=is_one_each,
    )


def interleaved(first: StepOutput, second: StepOutput) -> StepOutput:
    """Two front ends' entries in one step, in turns."""

    def mix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.stack([one, other], 1).ravel()

    return StepOutput(
        mix(first.frontends, second.frontends),
        mix(first.request_ids, second.request_ids),
        mix(first.branches, second.branches),
        mix(first.token_ids, second.token_ids),
        logprobs={1: Logprobs(-0.25, *_no_candidates()), 2: Logprobs(-0.75, *_no_candidates())},
    )


def _no_candidates() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, np.int32), np.empty(0, np.float32)


async def next_output(link: FrontendLink) -> pb.OutputBatch:
    frame = await asyncio.wait_for(anext(link.frames()), 5)
    return frame.output


def entries_of(output: pb.OutputBatch) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and branch, as a front end reads them."""
    tokens = iter(output.token_ids)
    branches = output.branches or [0] * len(output.request_ids)
    counts = output.token_counts or [1] * len(output.request_ids)
    read = {
        (request_id, branch): [next(tokens) for _ in range(count)]
        for request_id, branch, count in zip(output.request_ids, branches, counts, strict=True)
    }
    assert len(read) == len(output.request_ids), "a branch has two entries"
    assert next(tokens, None) is None
    return read


def logprobs_of(output: pb.OutputBatch) -> Iterator[tuple[float, list[int]] | None]:
    """Of each token, its own log-probability and the candidates' ids."""
    own, candidates = iter(output.token_logprobs), iter(output.candidate_token_ids)
    assert len(output.num_logprobs) == len(output.token_ids)
    for count in output.num_logprobs:
        yield (next(own), [next(candidates) for _ in range(count - 1)]) if count else None
    assert next(own, None) is next(candidates, None) is None
    assert len(output.candidate_logprobs) == len(output.candidate_token_ids)


async def test_another_front_ends_tokens_wake_nobody() -> None:
    link = FrontendLink(LINK, "f")
    link.push_tokens(step((4, 0, 40), frontend=LINK + 1))
    link.push_tokens(step())
    link.push_finish(pb.Finish(request_id=9))
    output = await next_output(link)
    assert not output.request_ids
    assert [finish.request_id for finish in output.finishes] == [9]


async def test_one_step_needs_no_counts_and_no_branches() -> None:
    link = FrontendLink(LINK, "f")
    link.push_tokens(step((4, 0, 40), (2, 0, 20)))
    output = await next_output(link)
    assert entries_of(output) == {(4, 0): [40], (2, 0): [20]}
    assert not any([output.token_counts, output.branches, output.num_logprobs])


async def test_each_branch_of_a_request_has_its_entry() -> None:
    link = FrontendLink(LINK, "f")
    link.push_tokens(step((4, 0, 40), (4, 1, 41), (2, 0, 20)))
    output = await next_output(link)
    assert list(output.branches) == [0, 1, 0]
    assert entries_of(output) == {(4, 0): [40], (4, 1): [41], (2, 0): [20]}


async def test_several_tokens_of_a_branch_in_one_step_are_one_entry() -> None:
    link = FrontendLink(LINK, "f")
    link.push_tokens(step((4, 0, 40), (4, 0, 41), (2, 0, 20), (4, 1, 42), is_one_each=False))
    assert entries_of(await next_output(link)) == {(4, 0): [40, 41], (4, 1): [42], (2, 0): [20]}


async def test_a_slow_front_end_gets_steps_merged_by_branch_in_order() -> None:
    link = FrontendLink(LINK, "f")
    link.push_tokens(step((4, 1, 40), (2, 0, 20)))
    link.push_tokens(step((2, 0, 21), (9, 0, 90), (4, 1, 41), (4, 0, 50)))
    link.push_tokens(step((2, 0, 22)))
    link.push_finish(pb.Finish(request_id=2))
    output = await next_output(link)
    assert entries_of(output) == {
        (2, 0): [20, 21, 22],
        (4, 0): [50],
        (4, 1): [40, 41],
        (9, 0): [90],
    }
    assert [finish.request_id for finish in output.finishes] == [2]


async def test_request_ids_of_any_size_keep_their_branches_apart() -> None:
    link = FrontendLink(LINK, "f")
    largest = 2**64 - 1
    link.push_tokens(step((largest, 0, 1), (largest, 127, 2), (largest >> 7, 127, 3)))
    link.push_tokens(step((largest, 0, 4)))
    assert entries_of(await next_output(link)) == {
        (largest, 0): [1, 4],
        (largest, 127): [2],
        (largest >> 7, 127): [3],
    }


async def test_log_probabilities_go_with_their_tokens() -> None:
    link = FrontendLink(LINK, "f")
    candidates = np.array([7, 8], np.int32), np.array([-1.0, -2.0], np.float32)
    link.push_tokens(step((4, 0, 40), (2, 0, 20), logprobs={1: Logprobs(-0.5, *candidates)}))
    output = await next_output(link)
    assert list(logprobs_of(output)) == [None, (-0.5, [7, 8])]
    assert list(output.candidate_logprobs) == [-1.0, -2.0]


async def test_log_probabilities_keep_their_tokens_when_steps_merge() -> None:
    link = FrontendLink(LINK, "f")
    first = np.array([7], np.int32), np.array([-1.0], np.float32)
    second = np.array([8], np.int32), np.array([-2.0], np.float32)
    link.push_tokens(step((9, 0, 90), (2, 0, 20), logprobs={0: Logprobs(-0.25, *first)}))
    link.push_tokens(step((2, 0, 21), (9, 0, 91), logprobs={1: Logprobs(-0.5, *second)}))
    output = await next_output(link)
    assert list(output.token_ids) == [20, 21, 90, 91]
    assert list(logprobs_of(output)) == [None, None, (-0.25, [7]), (-0.5, [8])]


async def test_log_probabilities_of_one_front_end_are_found_among_others() -> None:
    link = FrontendLink(LINK, "f")
    mine, others = step((4, 0, 40), (2, 0, 20)), step((4, 0, 41), (2, 0, 21), frontend=LINK + 1)
    link.push_tokens(interleaved(mine, others))
    assert list(logprobs_of(await next_output(link))) == [None, (-0.75, [])]


async def test_rejections_and_finishes_need_no_tokens() -> None:
    link = FrontendLink(LINK, "f")
    link.push_rejection(pb.Rejection(request_id=5, reason="TOO_LONG"))
    output = await next_output(link)
    assert [rejection.request_id for rejection in output.rejections] == [5]
    link.push_finish(pb.Finish(request_id=6))
    assert not (await next_output(link)).rejections


async def test_only_the_newest_state_is_sent_and_close_ends() -> None:
    link = FrontendLink(LINK, "f")
    link.push_state(pb.EngineState(ready=False))
    link.push_state(pb.EngineState(ready=True))
    frames = link.frames()
    assert (await anext(frames)).state.ready
    link.close()
    assert [frame async for frame in frames] == []

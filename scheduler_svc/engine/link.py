"""One front end as the engine sees it: its requests, and the output it has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.request import Request, TokenIds
from scheduler_svc.step_plan import Logprobs, StepOutput


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One step's tokens for this front end; parallel [n]."""

    request_ids: npt.NDArray[np.uint64]
    branches: npt.NDArray[np.int32]
    token_ids: TokenIds
    logprobs: Mapping[int, Logprobs]  # by index
    is_one_each: bool


class FrontendLink:
    """Output towards one front end. The engine never waits: what is not taken is merged."""

    def __init__(self, index: int, name: str) -> None:
        """Create link number `index` for a front end that calls itself `name`."""
        self.index = index
        self.name = name
        self.requests: dict[int, Request] = {}  # by request_id
        self._steps: list[_Tokens] = []
        self._batch = pb.OutputBatch()
        self._state: pb.EngineState | None = None
        self._event = asyncio.Event()
        self._is_closed = False

    def push_tokens(self, output: StepOutput) -> None:
        """Add this front end's part of one step's tokens, if there is any."""
        mine = np.flatnonzero(output.frontends == self.index)
        if not len(mine):
            return
        logprobs: Mapping[int, Logprobs] = {}
        if output.logprobs:
            found = ((i, output.logprobs.get(entry)) for i, entry in enumerate(mine.tolist()))
            logprobs = {i: each for i, each in found if each is not None}
        self._steps.append(
            _Tokens(
                output.request_ids[mine],
                output.branches[mine],
                output.token_ids[mine],
                logprobs,
                output.is_one_each,
            )
        )
        self._event.set()

    def push_finish(self, finish: pb.Finish) -> None:
        """Report the end of a branch, after its last tokens."""
        self._batch.finishes.append(finish)
        self._event.set()

    def push_rejection(self, rejection: pb.Rejection) -> None:
        """Report a request that was not queued."""
        self._batch.rejections.append(rejection)
        self._event.set()

    def push_state(self, state: pb.EngineState) -> None:
        """Report the engine's state; only the newest counts."""
        self._state = state
        self._event.set()

    def close(self) -> None:
        """End `frames`."""
        self._is_closed = True
        self._event.set()

    async def frames(self) -> AsyncIterator[pb.ConnectResponse]:
        """Everything pushed since the last frame, as soon as there is any."""
        while True:
            await self._event.wait()
            self._event.clear()
            if self._is_closed:
                return
            if self._state is not None:
                state, self._state = self._state, None
                yield pb.ConnectResponse(state=state)
            if self._steps or self._batch.finishes or self._batch.rejections:
                yield pb.ConnectResponse(output=self._take())

    def _take(self) -> pb.OutputBatch:
        batch, self._batch = self._batch, pb.OutputBatch()
        steps, self._steps = self._steps, []
        if len(steps) == 1 and steps[0].is_one_each:
            step = steps[0]
            _add_columns(batch, step.request_ids, step.branches, step.token_ids)
            if step.logprobs:
                _add_logprobs(batch, [step.logprobs.get(i) for i in range(len(step.token_ids))])
        elif steps:
            _merge(steps, batch)
        return batch


def _merge(steps: list[_Tokens], batch: pb.OutputBatch) -> None:
    """Several steps as one: by branch, each with its tokens in order of steps."""
    request_ids = np.concatenate([step.request_ids for step in steps])
    branches = np.concatenate([step.branches for step in steps])
    order = np.lexsort((branches, request_ids))
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = np.diff(request_ids[order]) != 0
    is_first[1:] |= np.diff(branches[order]) != 0
    firsts = np.flatnonzero(is_first)
    first_entries = order[firsts]
    token_ids = np.concatenate([step.token_ids for step in steps])[order]
    _add_columns(batch, request_ids[first_entries], branches[first_entries], token_ids)
    batch.token_counts.extend(np.diff(firsts, append=len(order)).tolist())
    if any(step.logprobs for step in steps):
        logprobs = [step.logprobs.get(i) for step in steps for i in range(len(step.token_ids))]
        _add_logprobs(batch, [logprobs[entry] for entry in order.tolist()])


def _add_columns(
    batch: pb.OutputBatch,
    request_ids: npt.NDArray[np.uint64],
    branches: npt.NDArray[np.int32],
    token_ids: TokenIds,
) -> None:
    batch.request_ids.extend(request_ids.tolist())
    batch.token_ids.extend(token_ids.tolist())
    if branches.any():
        batch.branches.extend(branches.tolist())


def _add_logprobs(batch: pb.OutputBatch, logprobs: list[Logprobs | None]) -> None:
    """Add the log-probabilities of all tokens of the batch; None: not asked for."""
    for each in logprobs:
        if each is None:
            batch.num_logprobs.append(0)
            continue
        batch.num_logprobs.append(1 + len(each.candidate_token_ids))
        batch.token_logprobs.append(each.logprob)
        batch.candidate_token_ids.extend(each.candidate_token_ids.tolist())
        batch.candidate_logprobs.extend(each.candidate_logprobs.tolist())

"""One front end as the engine sees it: its requests, and the output it has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.request import Request, TokenIds

RequestIds = npt.NDArray[np.uint64]


class FrontendLink:
    """Output towards one front end. The engine never waits: what is not taken is merged."""

    def __init__(self, index: int, name: str) -> None:
        """Create link number `index` for a front end that calls itself `name`."""
        self.index = index
        self.name = name
        self.requests: dict[int, Request] = {}  # by request_id
        self._tokens: list[tuple[RequestIds, TokenIds]] = []  # one entry per step
        self._batch = pb.OutputBatch()
        self._state: pb.EngineState | None = None
        self._event = asyncio.Event()
        self._is_closed = False

    def push_tokens(self, request_ids: RequestIds, token_ids: TokenIds) -> None:
        """Add one step's tokens; parallel [n]."""
        self._tokens.append((request_ids, token_ids))
        self._event.set()

    def push_finish(self, finish: pb.Finish) -> None:
        """Report the end of a request, after its last tokens."""
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
            if self._tokens or self._batch.finishes or self._batch.rejections:
                yield pb.ConnectResponse(output=self._take())

    def _take(self) -> pb.OutputBatch:
        batch, self._batch = self._batch, pb.OutputBatch()
        steps, self._tokens = self._tokens, []
        if len(steps) == 1:
            request_ids, token_ids = steps[0]
        elif steps:
            all_ids = np.concatenate([ids for ids, _ in steps])
            order = np.argsort(all_ids, kind="stable")  # by request, each in order of steps
            token_ids = np.concatenate([tokens for _, tokens in steps])[order]
            request_ids, counts = np.unique(all_ids, return_counts=True)
            batch.token_counts.extend(counts.tolist())
        else:
            return batch
        batch.request_ids.extend(request_ids.tolist())
        batch.token_ids.extend(token_ids.tolist())
        return batch

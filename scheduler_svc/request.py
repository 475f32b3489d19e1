"""A request and the only ways its status may change."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

NO_ROW: Final = -1


class RequestStatus(enum.Enum):
    """Where a request is. The FINISHED_* ones are final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED_STOP = enum.auto()
    FINISHED_LENGTH = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        """Whether no transition leads out of it."""
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


_FINISHED: Final = {status for status in RequestStatus if status.is_finished}
TRANSITIONS: Final[dict[RequestStatus, set[RequestStatus]]] = {
    # A waiting request can end by any reason: tokens of a preempted one may still be under way.
    RequestStatus.WAITING: {RequestStatus.RUNNING, *_FINISHED},
    # Back to WAITING by preemption or by the end of an epoch.
    RequestStatus.RUNNING: {RequestStatus.WAITING, *_FINISHED},
    **{status: set() for status in _FINISHED},
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn; see Submit in engine.proto for the fields' meaning."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One request of one front end. While it runs, its tokens live in the scheduler's rows."""

    key: int  # unique in the engine; also the order of arrival
    frontend: int  # index of the link it came over
    request_id: int  # unique within the front end
    token_ids: TokenIds  # [num_tokens]: the prompt, then committed outputs; stale while RUNNING
    num_prompt_tokens: int
    max_total_tokens: int  # prompt and output together
    arrival_ns: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()

    status: RequestStatus = RequestStatus.WAITING
    row: int = NO_ROW
    # Last step that computes for it; a preempted request re-enters only after that is committed.
    last_step_id: int = 0
    first_admitted_ns: int = 0
    num_preemptions: int = 0
    num_recoveries: int = 0
    # Epoch ends in a row that it was in flight at, with no token of it committed in between.
    num_suspicions: int = 0

    def move_to(self, status: RequestStatus) -> None:
        """Change the status by the table of legal transitions."""
        assert status in TRANSITIONS[self.status], (self.status, status)
        self.status = status

    @property
    def must_run_alone(self) -> bool:
        """Twice in flight at an epoch's end without progress: it may be what ends epochs."""
        return self.num_suspicions >= 2

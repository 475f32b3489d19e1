"""A request, its branches, and the only ways a branch's status may change."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler_svc.beam import BeamParams
from scheduler_svc.prefix_cache import BlockHash, private_root_hash, root_hash

TokenIds = npt.NDArray[np.int32]

NO_ROW: Final = -1

MAX_BRANCHES: Final = 128
"""Most samples or beams of one request, whatever the executor holds."""

MAX_PRIORITY: Final = 10
"""The highest class of service; the lowest is the negative of it."""


class RequestStatus(enum.Enum):
    """Where a branch is. The FINISHED_* ones are final."""

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
    # A waiting branch can end by any reason: tokens of a preempted one may still be under way.
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
    num_logprobs: int = 0  # 0 none, 1 + k: the token's own and the k likeliest


@dataclass(slots=True)
class BlockUsage:
    """What a request did to the pools, all branches together; see engine.proto."""

    held_block_ns: int = 0
    num_shared: int = 0
    num_copied: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """What one front end asked for. What happens to it is in its branches."""

    key: int  # unique in the engine; also the order of arrival
    frontend: int  # index of the link it came over
    request_id: int  # unique within the front end
    prompt: TokenIds  # [num_prompt_tokens]
    max_total_tokens: int  # prompt and output of one branch together
    arrival_ns: int
    deadline_ns: int = 0  # on the clock of arrival_ns; 0: none
    priority: int = 0  # class of service; higher is served first
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    # Beam search: whether output tokens, the newest included, complete a stop string.
    is_text_stopped: Callable[[TokenIds], bool] | None = None
    num_samples: int = 1
    beam: BeamParams | None = None
    cache_salt: bytes = b""
    is_cache_private: bool = False  # shares cached blocks with no other request

    cache_root: BlockHash = b""
    branches: list[Branch] = field(default_factory=list)  # by index; lanes if beams
    blocks: BlockUsage = field(default_factory=BlockUsage)
    # Order of service; see waiting_queue. Set when it is queued.
    latest_start_ns: int = 0  # to meet its deadline, as far as one can tell
    is_late: bool = False  # it waited for longer than that
    place: int = 0  # from 1, in the order in which requests first entered a row; 0: not yet
    first_admitted_ns: int = 0
    first_token_ns: int = 0  # when the engine got it; 0: not yet, or nobody measures
    num_cached_tokens: int = 0  # of the prompt, at first admission
    num_pruned_beams: int = 0  # lanes let go because no successor of their beam was kept
    # Whether its samples run by themselves; until then they wait for the first one's prefill.
    is_spawned: bool = False

    def __post_init__(self) -> None:
        count = self.beam.width if self.beam is not None else self.num_samples
        assert 1 <= count <= MAX_BRANCHES, count
        self.branches = [Branch(self, index, self.prompt) for index in range(count)]
        if self.is_cache_private:
            self.cache_root = private_root_hash(self.key)
        else:
            self.cache_root = root_hash(self.cache_salt)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def width(self) -> int:
        """Rows that it needs to enter: all lanes of a beam search, one sample at a time."""
        return len(self.branches) if self.beam is not None else 1

    @property
    def is_finished(self) -> bool:
        """Whether all branches have ended."""
        return all(branch.status.is_finished for branch in self.branches)


@dataclass(slots=True, eq=False)
class Branch:
    """One sequence of a request: a sample, or a lane of its beam search. It is what runs in a row.

    While it runs, its tokens live in the scheduler's rows.
    """

    request: Request
    index: int
    token_ids: TokenIds  # [num_tokens]: prompt and committed output; stale while RUNNING

    status: RequestStatus = RequestStatus.WAITING
    row: int = NO_ROW
    is_queued: bool = False  # in the waiting queue; samples not spawned yet are not
    # Hashes of the leading full blocks of its tokens, as far as they were needed yet.
    block_hashes: list[BlockHash] = field(default_factory=list)
    # Host blocks kept for it until it runs again.
    host_block_ids: list[int] = field(default_factory=list)
    # Last step that computes for it; a preempted branch re-enters only after that is committed.
    last_step_id: int = 0
    num_preemptions: int = 0
    num_recoveries: int = 0
    last_token_ns: int = 0  # when the engine got its newest token; as first_token_ns
    # Epoch ends in a row that it was in flight at, with no token of it committed in between.
    num_suspicions: int = 0

    @property
    def key(self) -> int:
        """Unique; its order is the order of arrival."""
        return self.request.key * MAX_BRANCHES + self.index

    @property
    def age(self) -> tuple[int, int]:
        """Its order is that in which branches that have run are served, the oldest first."""
        return self.request.place, self.key

    @property
    def max_total_tokens(self) -> int:
        """Prompt and output together."""
        return self.request.max_total_tokens

    def move_to(self, status: RequestStatus) -> None:
        """Change the status by the table of legal transitions."""
        assert status in TRANSITIONS[self.status], (self.status, status)
        self.status = status

    @property
    def must_run_alone(self) -> bool:
        """Twice in flight at an epoch's end without progress: it may be what ends epochs."""
        return self.num_suspicions >= 2

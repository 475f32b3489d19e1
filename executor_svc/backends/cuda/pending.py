"""Steps on their way: events, and results copied to pinned memory beside the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockyard.common.protocol import MAX_WINDOW
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.cuda.candidates import ranked_width
from executor_svc.backends.cuda.errors import device_errors
from executor_svc.backends.cuda.streams import new_event
from executor_svc.plan_check import MAX_CANDIDATES
from executor_svc.runner import FloatArray, IntArray, StepOutputs

NUM_SLOTS: Final = MAX_WINDOW + 2
"""A slot is used again only when its step's results were taken long ago."""

_NS_PER_MS: Final = 1e6


class StepSlot:
    """Memory and events of one step under way; slots take turns."""

    def __init__(self, capacity: int, max_rows: int, device: torch.device) -> None:
        """Allocate: `capacity` ints of input; results and candidates of each of max_rows."""
        self.inputs = torch.empty(capacity, dtype=torch.int32, pin_memory=True)
        size = (2, max_rows)
        self.results = torch.zeros(size, dtype=torch.int32, device=device)  # token ids, status
        self.host_results = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        most = max_rows * ranked_width(MAX_CANDIDATES)
        self._ranked = torch.empty(most, dtype=torch.float32, device=device)
        self._host_ranked = torch.empty(most, dtype=torch.float32, pin_memory=True)
        self._num_ranked = 0
        self.begin, self.forward_end, self.end = (new_event(is_timed=True) for _ in range(3))
        self.copied = new_event(is_waited_for=True)

    def reuse(self, stream: torch.cuda.Stream) -> None:
        """Make sure that the slot's last step is over, on the host and for `stream`."""
        self.copied.synchronize()
        stream.wait_event(self.copied)
        self._num_ranked = 0

    def take_ranked(self, num_rows: int, count: int) -> tuple[Tensor, Tensor]:
        """Where `count` candidates of each of num_rows go, see candidates.Ranker.rank.

        Returns:
            [num_rows, ranked_width(count)] float32 on the device, and the same in pinned memory,
            where they are once `copied` has passed.
        """
        size = num_rows, ranked_width(count)
        self._num_ranked = end = size[0] * size[1]
        return self._ranked[:end].view(size), self._host_ranked[:end].view(size)

    def copy_results(self, side: torch.cuda.Stream) -> None:
        """Enqueue the way of the results, and of what was ranked, to the host, after `end`."""
        side.wait_event(self.end)
        with torch.cuda.stream(side):
            self.host_results.copy_(self.results, non_blocking=True)
            if end := self._num_ranked:
                self._host_ranked[:end].copy_(self._ranked[:end], non_blocking=True)
            self.copied.record(side)


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates under way."""

    values: Tensor  # [m, ranked_width(most)], see candidates.Ranker.rank; the slot's pinned memory
    samples: npt.NDArray[np.int64]  # [m], which samples asked
    counts: npt.NDArray[np.int64]  # [m], for how many

    def unpack(self, is_failed: npt.NDArray[np.bool_]) -> tuple[IntArray, FloatArray, FloatArray]:
        """Ids and log-probabilities [sum(counts)], and those of the drawn tokens [m].

        Zeros for failed samples; is_failed is [num_samples].
        """
        values = np.where(is_failed[self.samples][:, None], np.float32(0), self.values.numpy())
        most = values.shape[1] // 2
        is_wanted = np.arange(most) < self.counts[:, None]
        ids = values[:, :most].view(np.int32)[is_wanted]
        return ids, values[:, most:-1][is_wanted], values[:, -1].copy()


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step enqueued; implements runner.PendingStep."""

    slot: StepSlot
    rows: IntArray  # [num_samples]
    before: StepSlot | None  # of the step before, if that was timed
    ranked: Ranked | None

    def wait(self) -> StepOutputs:
        """See PendingStep."""
        with device_errors():
            self.slot.copied.synchronize()
            return self._outputs()

    def _outputs(self) -> StepOutputs:
        slot, rows = self.slot, self.rows
        token_ids, status = slot.host_results[:, : rows.size].numpy().copy()
        is_failed = status != 0
        failed: Sequence[int] = rows[is_failed].tolist()
        empty = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)
        ranked = empty if self.ranked is None else self.ranked.unpack(is_failed)
        return StepOutputs(
            token_ids=token_ids,
            failed_rows=[(row, pb.ROW_STATUS_NUMERIC) for row in failed],
            candidate_token_ids=ranked[0],
            candidate_logprobs=ranked[1],
            token_logprobs=ranked[2],
            forward_ns=_ns(slot.begin, slot.forward_end),
            sample_ns=_ns(slot.forward_end, slot.end),
            idle_ns=0 if self.before is None else max(0, _ns(self.before.end, slot.begin)),
        )


class EmptyStep:
    """A step that only moved blocks; nothing is waited for, since later steps are ordered."""

    def wait(self) -> StepOutputs:
        """See PendingStep."""
        return StepOutputs(token_ids=np.empty(0, np.int32))


def _ns(begin: torch.cuda.Event, end: torch.cuda.Event) -> int:
    return int(begin.elapsed_time(end) * _NS_PER_MS)

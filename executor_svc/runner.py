"""The boundary between the step worker, which knows plans, and a runner, which knows a device.

The step worker validates a plan and applies its row metadata (plan_check, row_state); the runner
moves blocks, computes and samples. Neither file here nor the step worker imports torch: the
content-checking runner (backends/checking) stands behind the same protocol as the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from executor_svc.plan import Plan
    from executor_svc.row_state import RowState

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

LAST_SAMPLED = -1
"""In StepBatch.token_ids: the input is the row's last sampled token, which is on the device."""


class FatalDeviceError(Exception):
    """The device is lost to this process (a sticky CUDA error, say): only a new process helps."""


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner is and holds; the fields of DescribeResponse with the same names."""

    model_digest: str
    model_name: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    max_rows: int
    max_num_batched_tokens: int
    block_bytes: int
    device: str
    swap_bytes_per_s: float = 0.0  # between the pools, measured at start; 0: not measured


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass, in plan order, decode rows first. Host arrays; tokens are flattened."""

    rows: IntArray  # [num_rows]
    num_scheduled_tokens: IntArray  # [num_rows]
    num_computed_tokens: IntArray  # [num_rows], before this step
    num_decode_rows: int
    token_ids: IntArray  # [num_tokens], LAST_SAMPLED where the device has it
    sampling_rows: IntArray  # [num_samples], batch rows that sample, then rows with logits_from
    logits_indices: IntArray  # [num_samples], into [num_tokens]: whose hidden state to sample from
    sample_positions: IntArray  # [num_samples], absolute position of the token to be sampled


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step produced, on the host. Times in nanoseconds."""

    token_ids: IntArray  # [num_samples]
    failed_rows: Sequence[tuple[int, int]] = ()  # (row, RowStatus)
    # For sampling rows that asked for candidates, concatenated in order; else empty.
    candidate_token_ids: IntArray = field(default_factory=lambda: np.empty(0, np.int32))
    candidate_logprobs: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))
    token_logprobs: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))
    forward_ns: int = 0
    sample_ns: int = 0
    idle_ns: int = 0
    move_ns: int = 0  # of blocks, before the forward pass


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepOutputs:
        """Block until the results are on the host. Called once, on the completion thread.

        Raises FatalDeviceError if the device is lost; any other exception ends the epoch.
        """


class Runner(Protocol):
    """A device with a model and a block pool. All calls but `wait` come from one thread."""

    @property
    def info(self) -> RunnerInfo:
        """Constant for the runner's life."""

    def reset(self) -> None:
        """Forget all rows: a new epoch. Blocks need not be cleared. No step is under way."""

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """Move the plan's blocks (swap_out, copy, swap_in), then run the batch and sample.

        `state` already holds the plan's rows, tables and sampling parameters. Launches are
        ordered: a step sees everything that earlier ones wrote. Must not wait for results.
        `state` changes when launch has returned; what the step needs later must be copied from it.
        An empty batch still moves blocks. Raises as PendingStep.wait does.
        """

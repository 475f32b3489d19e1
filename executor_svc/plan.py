"""A step plan, decoded from protobuf columns into arrays. Checked by plan_check, not here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockyard.common.columns import unpack_u32
from blockyard.executor.v1 import executor_pb2 as pb

U32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Unordered (src, dst) block ids, parallel."""

    src: U32Array  # [n]
    dst: U32Array  # [n]


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows that begin; parallel columns [n] and two flat id columns. See the proto's NewRows."""

    rows: U32Array
    request_keys: npt.NDArray[np.uint64]
    branches: U32Array
    num_computed_tokens: U32Array
    num_tokens: U32Array
    num_prompt_tokens: U32Array
    token_ids: U32Array  # flat
    block_counts: U32Array
    block_ids: U32Array  # flat
    temperature: npt.NDArray[np.float32]
    top_k: U32Array
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]
    flags: U32Array
    num_candidates: U32Array
    logits_from: U32Array
    repetition_penalty: npt.NDArray[np.float32]
    presence_penalty: npt.NDArray[np.float32]
    frequency_penalty: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Field meanings and the order of application: protos, StepPlan."""

    epoch: int
    step_id: int
    swap_out: Pairs
    copy: Pairs
    swap_in: Pairs
    freed_rows: U32Array
    fork_src_rows: U32Array
    fork_dst_rows: U32Array
    fork_tail_dst_block_ids: U32Array
    new_rows: NewRows
    append_rows: U32Array  # [m]
    append_counts: U32Array  # [m]
    append_block_ids: U32Array  # [sum(append_counts)]
    input_rows: U32Array
    input_token_ids: U32Array
    same_batch: bool
    batch_rows: U32Array  # empty if same_batch
    num_scheduled_tokens: U32Array  # [len(batch_rows)]
    num_decode_rows: int

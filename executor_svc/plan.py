"""A step plan, decoded from protobuf columns into arrays. Checked by plan_check, not here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blockyard.common.columns import unpack_u32
from blockyard.executor.v1 import executor_pb2 as pb

U32Array = npt.NDArray[np.uint32]

_F32: Final = np.dtype(np.float32)
_U32: Final = np.dtype(np.uint32)
_U64: Final = np.dtype(np.uint64)
_EMPTY: Final[U32Array] = np.empty(0, _U32)


class PlanError(Exception):
    """The plan breaks the contract, a bug of the scheduler's. Nothing of it was applied."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
    token_ids: U32Array  # flat, num_sent_tokens[i] per row
    block_counts: U32Array
    block_ids: U32Array  # flat, block_counts[i] per row
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

    @property
    def first_sent_token(self) -> npt.NDArray[np.int64]:
        """Position of the first id in token_ids, per row [n]: 0 for rows with history."""
        has_history = self.flags & pb.ROW_FLAG_HISTORY != 0
        return np.where(has_history, 0, self.num_computed_tokens).astype(np.int64)

    @property
    def num_sent_tokens(self) -> npt.NDArray[np.int64]:
        """Ids in token_ids per row [n]; negative where num_computed_tokens is too large."""
        return self.num_tokens - self.first_sent_token


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
    num_decode_rows: int  # 0 if same_batch


def decode(message: pb.StepPlan) -> Plan:
    """Turn the columns of `message` into arrays; an empty parallel column becomes its default.

    Raises PlanError if the lengths of parallel columns differ. Values are not looked at, except
    where they say how long another column is.
    """
    fork_src_rows, fork_dst_rows, fork_tail_dst_block_ids = _decode_forks(message)
    append_rows, append_counts, append_block_ids = _decode_appends(message)
    input_rows, input_token_ids = _decode_inputs(message)
    same_batch, batch_rows, num_scheduled_tokens, num_decode_rows = _decode_batch(message)
    return Plan(
        epoch=message.epoch,
        step_id=message.step_id,
        swap_out=_decode_pairs(message, "swap_out"),
        copy=_decode_pairs(message, "copy"),
        swap_in=_decode_pairs(message, "swap_in"),
        freed_rows=_u32(message.freed_rows),
        fork_src_rows=fork_src_rows,
        fork_dst_rows=fork_dst_rows,
        fork_tail_dst_block_ids=fork_tail_dst_block_ids,
        new_rows=_decode_new_rows(message),
        append_rows=append_rows,
        append_counts=append_counts,
        append_block_ids=append_block_ids,
        input_rows=input_rows,
        input_token_ids=input_token_ids,
        same_batch=same_batch,
        batch_rows=batch_rows,
        num_scheduled_tokens=num_scheduled_tokens,
        num_decode_rows=num_decode_rows,
    )


def _decode_pairs(message: pb.StepPlan, name: str) -> Pairs:
    if not message.HasField(name):  # type: ignore[arg-type]  # one of three literals, see decode
        return _NO_PAIRS
    pairs: pb.BlockPairs = getattr(message, name)
    src = _u32(pairs.src)
    return Pairs(src, _exactly(_u32(pairs.dst), src.size, f"{name}.dst"))


def _decode_forks(message: pb.StepPlan) -> tuple[U32Array, U32Array, U32Array]:
    if not message.HasField("forks"):
        return _EMPTY, _EMPTY, _EMPTY
    forks = message.forks
    src_rows = _u32(forks.src_rows)
    dst_rows = _exactly(_u32(forks.dst_rows), src_rows.size, "forks.dst_rows")
    tails = _parallel(forks.tail_dst_block_ids, src_rows.size, "forks.tail_dst_block_ids")
    return src_rows, dst_rows, tails


def _decode_appends(message: pb.StepPlan) -> tuple[U32Array, U32Array, U32Array]:
    if not message.HasField("appends"):
        return _EMPTY, _EMPTY, _EMPTY
    appends = message.appends
    rows = _u32(appends.rows)
    counts = _parallel(appends.counts, rows.size, "appends.counts", default=1)
    block_ids = _exactly(_u32(appends.block_ids), _total(counts), "appends.block_ids")
    return rows, counts, block_ids


def _decode_inputs(message: pb.StepPlan) -> tuple[U32Array, U32Array]:
    if not message.HasField("inputs"):
        return _EMPTY, _EMPTY
    rows = _u32(message.inputs.rows)
    return rows, _parallel(message.inputs.token_ids, rows.size, "inputs.token_ids")


def _decode_batch(message: pb.StepPlan) -> tuple[bool, U32Array, U32Array, int]:
    batch = message.batch
    if not batch.same:
        rows = _u32(batch.rows)
        counts = batch.num_scheduled_tokens
        scheduled = _parallel(counts, rows.size, "batch.num_scheduled_tokens", default=1)
        return False, rows, scheduled, batch.num_decode_rows
    if batch.rows or batch.num_scheduled_tokens or batch.num_decode_rows:
        raise PlanError("batch: `same` is set together with other fields")
    return True, _EMPTY, _EMPTY, 0


def _decode_new_rows(message: pb.StepPlan) -> NewRows:
    if not message.HasField("new_rows"):
        return _NO_ROWS
    new = message.new_rows
    rows = _u32(new.rows)

    def column(name: str, dtype: np.dtype[Any] = _U32) -> npt.NDArray[Any]:
        return _parallel(getattr(new, name), rows.size, f"new_rows.{name}", dtype=dtype)

    decoded = NewRows(
        rows=rows,
        request_keys=column("request_keys", _U64),
        branches=column("branches"),
        num_computed_tokens=column("num_computed_tokens"),
        num_tokens=column("num_tokens"),
        num_prompt_tokens=column("num_prompt_tokens"),
        token_ids=_unpack(new.token_ids, "new_rows.token_ids"),
        block_counts=column("block_counts"),
        block_ids=_unpack(new.block_ids, "new_rows.block_ids"),
        temperature=column("temperature", _F32),
        top_k=column("top_k"),
        top_p=column("top_p", _F32),
        min_p=column("min_p", _F32),
        seeds=column("seeds", _U64),
        flags=column("flags"),
        num_candidates=column("num_candidates"),
        logits_from=column("logits_from"),
        repetition_penalty=column("repetition_penalty", _F32),
        presence_penalty=column("presence_penalty", _F32),
        frequency_penalty=column("frequency_penalty", _F32),
    )
    _exactly(decoded.block_ids, _total(decoded.block_counts), "new_rows.block_ids")
    if np.any(decoded.num_sent_tokens < 0):
        raise PlanError("new_rows.num_computed_tokens: more than num_tokens")
    _exactly(decoded.token_ids, _total(decoded.num_sent_tokens), "new_rows.token_ids")
    return decoded


def _u32(values: Collection[int]) -> U32Array:
    return np.fromiter(values, _U32, len(values)) if values else _EMPTY


def _total(counts: npt.NDArray[np.integer]) -> int:
    return int(counts.sum(dtype=np.int64))


def _exactly(array: U32Array, length: int, name: str) -> U32Array:
    if array.size != length:
        raise PlanError(f"{name}: {array.size} values where {length} belong")
    return array


def _parallel(
    values: Collection[float],
    length: int,
    name: str,
    *,
    dtype: np.dtype[Any] = _U32,
    default: int = 0,
) -> npt.NDArray[Any]:
    if not values:
        return np.full(length, default, dtype)
    return _exactly(np.fromiter(values, dtype, len(values)), length, name)


def _unpack(data: bytes, name: str) -> U32Array:
    if len(data) % 4:
        raise PlanError(f"{name}: {len(data)} bytes are not whole uint32 values")
    return unpack_u32(data)


_NO_PAIRS: Final = Pairs(_EMPTY, _EMPTY)
_NO_ROWS: Final = _decode_new_rows(pb.StepPlan(new_rows=pb.NewRows()))

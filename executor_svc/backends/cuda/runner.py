"""The runner on a GPU: upload what the plan says, move blocks, forward, sample, copy results back.

The launching thread only enqueues. A step of decode rows alone replays a captured graph; any other
enqueues the same kernels one by one. Everything a step needs of the host travels in one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockyard.executor.v1 import executor_pb2 as pb
from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.prefill import prefill_items
from cupy_kernels.sample import Sample, SamplingColumns
from cupy_kernels.shape import AttentionShape
from cupy_kernels.staging import ENTRY_INTS, WriteTable
from executor_svc.backends.cuda.arena import StepArena
from executor_svc.backends.cuda.backend import CudaBackend
from executor_svc.backends.cuda.candidates import Ranker
from executor_svc.backends.cuda.errors import device_errors
from executor_svc.backends.cuda.graphs import DecodeGraphs
from executor_svc.backends.cuda.kv_pool import CudaKvPool
from executor_svc.backends.cuda.pending import (
    NUM_SLOTS,
    EmptyStep,
    LaunchedStep,
    Ranked,
    StepSlot,
)
from executor_svc.backends.cuda.streams import new_stream
from executor_svc.model.llama import LlamaModel
from executor_svc.plan_check import MAX_CANDIDATES
from executor_svc.row_state import ranges
from executor_svc.runner import IntArray, RunnerInfo, StepBatch

if TYPE_CHECKING:
    from executor_svc.plan import Plan
    from executor_svc.row_state import RowState

_PARAMETERS: Final = ("top_p", "min_p", "seeds", "branches")
_MIN_TEMPERATURE: Final = 1e-6
_MAX_TOP_K: Final = 2**31 - 1


class CudaRunner:
    """A model, its block pool and its sampler on one GPU; implements runner.Runner."""

    def __init__(
        self,
        info: RunnerInfo,
        device: Device,
        model: LlamaModel,
        backend: CudaBackend,
        pool: CudaKvPool,
    ) -> None:
        """Takes over a model whose weights the backend packed, and a pool."""
        self._info = info
        self._model = model
        self._backend = backend
        self.pool = pool
        backend.use_pool(pool.blocks)
        self._stream = backend.stream
        self._side = new_stream(backend.torch_device)
        max_tokens = max(info.max_num_batched_tokens, info.max_rows)
        self._arena = StepArena(info.max_rows, max_tokens, backend.torch_device)
        self._slots = [
            StepSlot(self._arena.capacity, info.max_rows, backend.torch_device)
            for _ in range(NUM_SLOTS)
        ]
        self._num_steps = 0
        self._before: StepSlot | None = None
        self._graphs = DecodeGraphs(info.max_rows)
        self._write_table = WriteTable(device)
        self._sample = Sample(device, backend.shape.element)
        self._sample_launch = self._pack_sample()
        self._ranker = Ranker(info.vocab_size, backend.dtype, backend.torch_device)
        hidden = model.embedding.shape[1]
        self._selected = torch.empty(
            info.max_rows, hidden, dtype=backend.dtype, device=backend.torch_device
        )

    def _pack_sample(self) -> Launch:
        columns, rows = self._arena.columns, slice(self._info.max_rows)
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "branches", "positions")
        return self._sample.pack(
            logits=self._backend.logits,
            vocab_size=self._info.vocab_size,
            columns=SamplingColumns(**{name: columns[name][rows] for name in names}),
            token_ids=self._slots[0].results[0],
            status=self._slots[0].results[1],
            rows=columns["rows"][rows],
            last_tokens=self._backend.last_tokens,
        )

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[float], None]) -> None:
        """Do whatever a step may do, on padding alone, and capture the graphs.

        What the device sets up on first use is there afterwards: modules, workspaces of products,
        memory of sorts. Later steps take no more of it.

        Args:
            progress: told the fraction done.
        """
        torch.cuda.synchronize()  # weights and zeros are written on another stream
        with torch.cuda.stream(self._stream):
            self._arena.tokens.zero_()
            for num_tokens in warm_up_sizes(len(self._arena.tokens), self._info.max_rows):
                self._warm_up_forward(num_tokens)
            self._warm_up_sampling(self._slots[0])
        self._graphs.capture(self._decode, self._stream, progress)
        torch.cuda.synchronize()

    def _warm_up_forward(self, num_tokens: int) -> None:
        """A row of padding that decodes, and one token of prefill at position 0 of block 0."""
        backend, model, max_rows = self._backend, self._model, self._info.max_rows
        item = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32, device=backend.torch_device)
        backend.stage(self._arena.tokens[:num_tokens])
        backend.begin(num_tokens, 1, item)
        hidden = model.forward(backend, backend.embed(model.embedding))
        indices = self._arena.columns["logits_indices"][:max_rows]  # zeros
        model.logits(torch.index_select(hidden, 0, indices, out=self._selected))

    def _warm_up_sampling(self, slot: StepSlot) -> None:
        max_rows, vocab_size = self._info.max_rows, self._info.vocab_size
        token_ids, status = slot.results
        self._sample.resize(self._sample_launch, max_rows, token_ids, status)
        self._sample_launch.run(self._stream.cuda_stream)
        rows = np.arange(max_rows)
        on_device = torch.from_numpy(rows.astype(np.int32)).to(self._backend.torch_device)
        counts = np.full(max_rows, min(MAX_CANDIDATES, vocab_size), np.int64)
        self._rank(slot, rows, on_device, counts)
        slot.end.record(self._stream)
        slot.copy_results(self._side)

    @torch.inference_mode()
    def use_pool(
        self, pool: CudaKvPool, info: RunnerInfo, progress: Callable[[float], None]
    ) -> None:
        """Go on with another pool, described by `info`; what was in the old one is lost.

        Waits for the device, and captures the graphs again, which read the pool.
        """
        torch.cuda.synchronize()
        self.pool, self._info = pool, info
        self._backend.use_pool(pool.blocks)
        self._graphs.capture(self._decode, self._stream, progress)
        torch.cuda.synchronize()

    @property
    def info(self) -> RunnerInfo:
        """See Runner."""
        return self._info

    @property
    def shape(self) -> AttentionShape:
        """Heads and the layout of a block."""
        return self._backend.shape

    def replace_samples(self, rows: IntArray, token_ids: IntArray) -> None:
        """Let rows [n] go on as if the last step had sampled token_ids [n]; for tests.

        In the order of the steps; nobody waits.
        """
        device = self._backend.torch_device
        with torch.cuda.stream(self._stream):
            places, tokens = (
                torch.from_numpy(column.astype(np.int64)).pin_memory().to(device, non_blocking=True)
                for column in (rows, token_ids)
            )
            self._backend.last_tokens.index_copy_(0, places, tokens.int())

    def reset(self) -> None:
        """See Runner. Rows hold nothing that a new row could read."""
        self._before = None

    @torch.inference_mode()
    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> LaunchedStep | EmptyStep:
        """See Runner."""
        with device_errors():
            torch.cuda.set_device(self._backend.torch_device)
            slot = self._slots[self._num_steps % NUM_SLOTS]
            self._num_steps += 1
            slot.reuse(self._stream)
            with torch.cuda.stream(self._stream):
                return self._launch(plan, state, batch, slot)

    def _launch(
        self, plan: Plan, state: RowState, batch: StepBatch, slot: StepSlot
    ) -> LaunchedStep | EmptyStep:
        num_rows, num_tokens = batch.rows.size, batch.token_ids.size
        graph_size = self._graphs.size_for(num_rows) if _is_plain_decode(batch) else 0
        tokens = self._arena.begin(slot.inputs, max(num_tokens, graph_size))
        _fill_tokens(tokens, batch)
        self._fill_sampling(state, batch)
        moves = self.pool.stage(plan, self._arena.put)
        entries = self._stage_entries(plan, state)
        items = None if graph_size else self._stage_items(batch)
        asked = np.flatnonzero(state.num_candidates[batch.sampling_rows])
        asked_on_device = self._arena.put(asked.astype(np.int32)) if asked.size else None
        slot.begin.record(self._stream)
        self._arena.upload()
        for move in moves:
            move()
        if entries is not None:
            entries.run(self._stream.cuda_stream)
        if not num_rows:
            slot.copied.record(self._stream)
            self._before = None  # there was nothing to do: the device was not kept waiting
            return EmptyStep()
        if graph_size:
            self._graphs.replay(graph_size)
        else:
            self._forward(batch, items)
        slot.forward_end.record(self._stream)
        ranked = None
        if num_samples := batch.sampling_rows.size:
            token_ids, status = slot.results
            self._sample.resize(self._sample_launch, num_samples, token_ids, status)
            self._sample_launch.run(self._stream.cuda_stream)
            if asked_on_device is not None:
                counts = state.num_candidates[batch.sampling_rows[asked]].astype(np.int64)
                ranked = self._rank(slot, asked, asked_on_device, counts)
        slot.end.record(self._stream)
        slot.copy_results(self._side)
        before, self._before = self._before, slot
        return LaunchedStep(slot, batch.sampling_rows, before, ranked)

    @torch.inference_mode()
    def score(self, num_tokens: int) -> Tensor:
        """What the model says after each token of the last step launched, for evaluation.

        The device's current stream waits for it, the caller does not.

        Args:
            num_tokens: of that step; at least 1.

        Returns:
            Log-probabilities [num_tokens, vocab_size] float32, on the device.

        Raises FatalDeviceError.
        """
        backend, vocab_size = self._backend, self._info.vocab_size
        with device_errors():
            current = torch.cuda.current_stream(backend.torch_device)
            scores = torch.empty(num_tokens, vocab_size, device=backend.torch_device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for begin in range(0, num_tokens, self._info.max_rows):
                    end = min(begin + self._info.max_rows, num_tokens)
                    # The next piece's logits overwrite these.
                    logits = self._model.logits(backend.normed[begin:end])
                    scores[begin:end] = logits.float().log_softmax(-1)
            current.wait_stream(self._stream)
        return scores

    def _decode(self, num_rows: int) -> None:
        """A step of rows of one token each, from the arena's first tokens to logits."""
        backend, model = self._backend, self._model
        backend.stage(self._arena.tokens[:num_rows])
        backend.begin(num_rows, num_rows, None)
        model.logits(model.forward(backend, backend.embed(model.embedding)))

    def _forward(self, batch: StepBatch, items: Tensor | None) -> None:
        """Any step, up to the logits of what it samples."""
        backend, model = self._backend, self._model
        backend.stage(self._arena.tokens[: batch.token_ids.size])
        backend.begin(batch.token_ids.size, batch.num_decode_rows, items)
        hidden = model.forward(backend, backend.embed(model.embedding))
        if num_samples := batch.sampling_rows.size:
            indices = self._arena.columns["logits_indices"][:num_samples]
            selected = self._selected[:num_samples]
            model.logits(torch.index_select(hidden, 0, indices, out=selected))

    def _rank(
        self,
        slot: StepSlot,
        asked: npt.NDArray[np.int64],
        asked_on_device: Tensor,
        counts: npt.NDArray[np.int64],
    ) -> Ranked:
        logits = self._backend.logits[:, : self._info.vocab_size]
        values, on_host = slot.take_ranked(asked.size, int(counts.max()))
        self._ranker.rank(logits, asked_on_device, slot.results[0], values)
        return Ranked(on_host, asked, counts)

    # ---- what the host says

    def _fill_sampling(self, state: RowState, batch: StepBatch) -> None:
        rows, arena = batch.sampling_rows, self._arena
        if (state.flags[rows] & pb.ROW_FLAG_HISTORY).any():
            raise NotImplementedError("penalties are not computed on the GPU")
        for name in _PARAMETERS:
            arena.fill(name, getattr(state, name)[rows])
        # So low that scores overflow or lose the Gumbel noise to rounding: greedy but for ties.
        temperature = state.temperature[rows]
        arena.fill("temperature", np.where(temperature < _MIN_TEMPERATURE, 0, temperature))
        arena.fill("top_k", np.minimum(state.top_k[rows], _MAX_TOP_K))
        arena.fill("positions", batch.sample_positions)
        arena.fill("rows", rows)
        arena.fill("logits_indices", batch.logits_indices)

    def _stage_items(self, batch: StepBatch) -> Tensor | None:
        first = batch.num_decode_rows
        if first == batch.rows.size:
            return None
        items = prefill_items(
            self._backend.shape,
            batch.rows[first:],
            batch.num_scheduled_tokens[first:],
            batch.num_computed_tokens[first:],
            first_query=first,
        )
        return self._arena.put(items)

    def _stage_entries(self, plan: Plan, state: RowState) -> Launch | None:
        """The block table's changes; if they are too many, the whole table, here and now."""
        table = self._backend.block_table
        entries = table_entries(plan, state, table.shape[1])
        if not len(entries):
            return None
        if entries.size > self._arena.room // 2:
            table[:, : state.block_table.shape[1]] = torch.from_numpy(state.block_table)
            return None
        return self._write_table.pack(entries=self._arena.put(entries), block_table=table)


def table_entries(plan: Plan, state: RowState, stride: int) -> npt.NDArray[np.int32]:
    """Entries [n, 2] of the block table that an applied plan changed: flat index, block id.

    Rows of the device's table are `stride` apart. An entry that two parts of the plan touch stands
    twice, with the same id.
    """
    begun, forked, grown = plan.new_rows.rows, plan.fork_dst_rows, plan.append_rows
    if not begun.size + forked.size + grown.size:
        return np.empty((0, ENTRY_INTS), np.int32)
    rows = np.concatenate([begun, forked, grown]).astype(np.int64)
    counts = state.num_blocks[rows].astype(np.int64)
    counts[begun.size + forked.size :] = plan.append_counts
    starts = state.num_blocks[rows] - counts
    places = ranges(counts) + np.repeat(starts, counts)
    rows = np.repeat(rows, counts)
    entries = np.empty((rows.size, ENTRY_INTS), np.int32)
    entries[:, 0] = rows * stride + places
    entries[:, 1] = state.block_table[rows, places]
    return entries


def warm_up_sizes(max_tokens: int, max_rows: int) -> list[int]:
    """Tokens of the steps that a warm-up runs: halves of the largest, down to what graphs do.

    Products of other sizes choose among the same kernels.
    """
    sizes = [max_tokens]
    while sizes[-1] > max_rows:
        sizes.append(max(sizes[-1] // 2, max_rows))
    return sizes


def _is_plain_decode(batch: StepBatch) -> bool:
    """Whether every row computes one token and samples from it, in order."""
    num_rows = batch.rows.size
    return bool(
        num_rows
        and batch.num_decode_rows == num_rows == batch.sampling_rows.size
        and np.array_equal(batch.logits_indices, np.arange(num_rows))
    )


def _fill_tokens(tokens: npt.NDArray[np.int32], batch: StepBatch) -> None:
    """Lay out tokens [>= num_tokens, 4], see cupy_kernels.staging; the rest is padding."""
    num_tokens = batch.token_ids.size
    tokens[:num_tokens, 0] = batch.token_ids
    if num_tokens == batch.rows.size:
        tokens[:num_tokens, 1] = batch.rows
        tokens[:num_tokens, 2] = batch.num_computed_tokens
    else:
        counts = batch.num_scheduled_tokens
        tokens[:num_tokens, 1] = np.repeat(batch.rows, counts)
        tokens[:num_tokens, 2] = np.repeat(batch.num_computed_tokens, counts) + ranges(counts)
    tokens[:num_tokens, 3] = 1
    tokens[num_tokens:] = 0

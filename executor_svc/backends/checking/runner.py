"""A runner without a model whose output depends on the content of every block it should read.

Its KV is a digest of token and position per slot; its model reads the digests of all positions
through the block table and derives the next token from them (digests.py). A block freed too early,
a wrong swap, a stale prefix hit, a missed append: each changes the output.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.digests import (
    POISON,
    Sampling,
    U64Array,
    candidates,
    next_tokens,
    position_contexts,
    position_weights,
    token_digests,
    token_logprob,
)
from executor_svc.plan import Pairs, Plan
from executor_svc.row_state import RowState, ranges
from executor_svc.runner import (
    LAST_SAMPLED,
    FatalDeviceError,
    FloatArray,
    IntArray,
    PendingStep,
    RunnerInfo,
    StepBatch,
    StepOutputs,
)

DEVICE: Final = "fake"
"""What a runner that checks content calls its device."""

_NS_PER_S: Final = 1_000_000_000


def fake_info(
    num_device_blocks: int,
    num_host_blocks: int = 0,
    *,
    block_size: int = 16,
    max_rows: int = 256,
    max_model_len: int = 2048,
    max_num_batched_tokens: int = 512,
    vocab_size: int = 1000,
) -> RunnerInfo:
    """A runner's sizes; block 0 is one of num_device_blocks."""
    return RunnerInfo(
        model_digest="fake",
        model_name="fake",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=block_size,
        num_device_blocks=num_device_blocks,
        num_host_blocks=num_host_blocks,
        max_rows=max_rows,
        max_num_batched_tokens=max_num_batched_tokens,
        block_bytes=8 * block_size,
        device=DEVICE,
    )


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """How a fake runner behaves; the defaults are instant and never fail."""

    check_content: bool = True  # False: no KV, the token follows from seed and position
    order_seed: int = 0  # for the order in which unordered pairs run
    busy_s: float = 0.0  # Python at work in each launch, the interpreter lock held
    step_s: float = 0.0  # device time of each step
    failures: Mapping[int, Exception] = field(default_factory=dict)  # by number of the launch, >= 1
    fails_in_wait: bool = False  # `failures` come out of wait, not of launch
    nan_seeds: Set[int] = frozenset()  # rows with these seeds fail alone; may change any time
    fatal_seeds: Set[int] = frozenset()  # a launch with such a row loses the device


@dataclass(frozen=True, slots=True)
class _FakeStep:
    outputs: StepOutputs
    ready_ns: int
    failure: Exception | None

    def wait(self) -> StepOutputs:
        delay_ns = self.ready_ns - time.monotonic_ns()
        if delay_ns > 0:
            time.sleep(delay_ns / _NS_PER_S)
        if self.failure is not None:
            raise self.failure
        return self.outputs


class FakeRunner:
    """An executor_svc.runner.Runner. Content is computed at launch, device time passes in wait."""

    def __init__(self, info: RunnerInfo, options: FakeOptions | None = None) -> None:
        """Make pools of the sizes in `info`, all poisoned."""
        self._options = options or FakeOptions()
        if not self._options.check_content:
            info = dataclasses.replace(info, device=f"{DEVICE}, no KV")
        self._info = info
        self._random = np.random.default_rng(self._options.order_seed)
        self._weights = position_weights(np.arange(info.max_model_len))  # [max_model_len]
        self._device = np.empty((info.num_device_blocks, info.block_size), np.uint64)
        self._host = np.empty((info.num_host_blocks, info.block_size), np.uint64)
        self._last_sampled = np.zeros(info.max_rows, np.int32)  # "on the device"
        self._num_launches = 0
        self._device_free_ns = 0  # when the steps launched so far are over
        self.reset()

    @property
    def info(self) -> RunnerInfo:
        """Constant."""
        return self._info

    @property
    def device_digests(self) -> U64Array:
        """What the slots hold [num_device_blocks, block_size], POISON where nothing was written."""
        return self._device

    @property
    def host_digests(self) -> U64Array:
        """The same for the host pool [num_host_blocks, block_size]."""
        return self._host

    def reset(self) -> None:
        """Poison everything: nothing may be read that this epoch did not write."""
        self._device.fill(POISON)
        self._host.fill(POISON)

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch."""
        options = self._options
        self._num_launches += 1
        _spin(options.busy_s)
        failure = options.failures.get(self._num_launches)
        if failure is not None and not options.fails_in_wait:
            raise failure
        fatal = options.fatal_seeds
        if fatal and not fatal.isdisjoint(state.seeds[batch.rows].tolist()):
            raise FatalDeviceError("a row that was asked to lose the device")
        now_ns = time.monotonic_ns()
        idle_ns = max(0, now_ns - self._device_free_ns) if self._device_free_ns else 0
        step_ns = int(options.step_s * _NS_PER_S) if batch.rows.size else 0
        self._device_free_ns = max(now_ns, self._device_free_ns) + step_ns
        begin_ns = time.monotonic_ns()
        self._run_pairs(plan.swap_out, self._device, self._host)
        self._run_pairs(plan.copy, self._device, self._device)
        self._run_pairs(plan.swap_in, self._host, self._device)
        move_ns = time.monotonic_ns() - begin_ns
        outputs = self._sample(state, batch, self._contexts(state, batch))
        outputs = dataclasses.replace(outputs, forward_ns=step_ns, idle_ns=idle_ns, move_ns=move_ns)
        return _FakeStep(outputs, self._device_free_ns, failure)

    def _run_pairs(self, pairs: Pairs, src_pool: U64Array, dst_pool: U64Array) -> None:
        for index in self._random.permutation(pairs.src.size):
            dst_pool[pairs.dst[index]] = src_pool[pairs.src[index]]

    def _contexts(self, state: RowState, batch: StepBatch) -> U64Array:
        """Store the inputs of all rows, then let every sample read its whole sequence [samples]."""
        if not self._options.check_content:
            seeds = state.seeds[batch.sampling_rows]
            return position_contexts(batch.sample_positions, seeds)
        counts = batch.num_scheduled_tokens
        rows = np.repeat(batch.rows, counts)  # [num_tokens]
        positions = np.repeat(batch.num_computed_tokens, counts) + ranges(counts)
        is_on_device = batch.token_ids == LAST_SAMPLED
        token_ids = np.where(is_on_device, self._last_sampled[rows], batch.token_ids)
        slots = self._slots(state, rows, positions)
        pool = self._device.reshape(-1)
        pool[slots] = token_digests(token_ids, positions)

        lengths = positions[batch.logits_indices] + 1  # [num_samples]
        read_positions = ranges(lengths)
        read_rows = np.repeat(rows[batch.logits_indices], lengths)
        read = pool[self._slots(state, read_rows, read_positions)] * self._weights[read_positions]
        if not lengths.size:
            return np.empty(0, np.uint64)
        return np.add.reduceat(read, np.cumsum(lengths) - lengths)

    def _slots(
        self, state: RowState, rows: IntArray, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        block_size = self._info.block_size
        block_ids = state.block_table[rows, positions // block_size].astype(np.int64)
        return block_ids * block_size + positions % block_size

    def _sample(self, state: RowState, batch: StepBatch, contexts: U64Array) -> StepOutputs:
        rows, vocab_size = batch.sampling_rows, self._info.vocab_size
        sampling = Sampling(
            state.temperature[rows],
            state.top_k[rows],
            state.top_p[rows],
            state.min_p[rows],
            state.seeds[rows],
            state.branches[rows],
        )
        token_ids = next_tokens(contexts, sampling, vocab_size)
        failed_rows = self._failed(rows, sampling.seeds)
        is_failed = np.isin(rows, [row for row, _ in failed_rows])
        token_ids[is_failed] = (token_ids[is_failed] + 1) % vocab_size  # meaningless
        self._last_sampled[rows] = token_ids
        ids: list[IntArray] = [np.empty(0, np.int32)]
        logprobs: list[FloatArray] = [np.empty(0, np.float32)]
        own: list[np.float32] = []
        wanted = state.num_candidates[rows]
        for index in np.flatnonzero(wanted):
            best = candidates(contexts[index], int(wanted[index]), vocab_size)
            ids.append(best[0])
            logprobs.append(best[1])
            own.append(token_logprob(contexts[index], int(token_ids[index]), vocab_size))
        return StepOutputs(
            token_ids=token_ids,
            failed_rows=failed_rows,
            candidate_token_ids=np.concatenate(ids),
            candidate_logprobs=np.concatenate(logprobs),
            token_logprobs=np.array(own, np.float32),
        )

    def _failed(self, rows: IntArray, seeds: U64Array) -> list[tuple[int, int]]:
        if not self._options.nan_seeds:
            return []
        pairs = zip(rows.tolist(), seeds.tolist(), strict=True)
        bad = self._options.nan_seeds
        return [(row, int(pb.ROW_STATUS_NUMERIC)) for row, seed in pairs if seed in bad]


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

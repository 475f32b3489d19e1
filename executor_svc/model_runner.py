"""The runner with a real model: move blocks, prepare inputs, forward, sample.

On a CPU the device is the process itself: `launch` computes and returns when the step is done, and
`wait` only hands the results over. What later steps need stays here, on the device: the blocks and
the tokens that each row sampled last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

# The backend is imported before torch, because it sets up the OpenMP runtimes.
from executor_svc.backends.cpu import work
from executor_svc.backends.cpu.backend import CpuBackend

import torch  # isort: skip

from blockyard.common import model_dir as model_dirs
from blockyard.common.model_dir import ModelDir
from blockyard.common.protocol import MAX_WINDOW
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc import sampler
from executor_svc.kv_pool import KvPool
from executor_svc.model.config import ModelConfig, model_len, parse_config
from executor_svc.model.llama import LlamaModel, load_llama
from executor_svc.model.weights import Weights
from executor_svc.runner import LAST_SAMPLED, IntArray, RunnerInfo, StepBatch, StepOutputs
from executor_svc.sampler import Penalties, Samples, SamplingParams

if TYPE_CHECKING:
    from executor_svc.plan import Plan
    from executor_svc.row_state import RowState

# The history on the host may lack what the steps in flight sampled, and the last input.
_NUM_RECENT: Final = MAX_WINDOW + 1

# See tokens_per_step.
_LONGEST_STEP_S: Final = 0.3
_STEP_UNIT: Final = 32
_MIN_TOKENS_PER_STEP: Final = 64
_MAX_TOKENS_PER_STEP: Final = 256
_TIMED_TOKENS: Final = 64


class _FinishedStep:
    """A step of a device that is done when `launch` returns."""

    def __init__(self, outputs: StepOutputs) -> None:
        self._outputs = outputs

    def wait(self) -> StepOutputs:
        """The results; never blocks."""
        return self._outputs


class ModelRunner:
    """A model, its block pool and its sampler on one backend; implements runner.Runner."""

    def __init__(
        self, info: RunnerInfo, model: LlamaModel, backend: CpuBackend, pool: KvPool
    ) -> None:
        self._info = info
        self._model = model
        self._backend = backend
        self._pool = pool
        # Tokens sampled last, by row and position modulo _NUM_RECENT.
        self._recent: IntArray = np.zeros((info.max_rows, _NUM_RECENT), np.int32)
        self._last_end_ns = 0

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        kv_memory_bytes: int,
        block_size: int,
        max_rows: int,
        max_num_batched_tokens: int | None,
        max_model_len: int | None,
        num_threads: int,
        num_host_blocks: int = 0,
        progress: Callable[[str, float], None] | None = None,
    ) -> Self:
        """Load a model directory and allocate all memory.

        Args:
            model_dir: as `blockyard models import` writes it.
            kv_memory_bytes: bound of the device pool, the padding block included.
            block_size: tokens per KV block.
            max_rows: rows resident at once.
            max_num_batched_tokens: most tokens in one step; None: see tokens_per_step.
            max_model_len: longest sequence; None: what the model's positions allow.
            num_threads: threads that compute.
            num_host_blocks: blocks of the host pool.
            progress: told (stage, fraction done) while loading.

        Raises:
            ModelDirError: the directory is not one of ours or lacks files.
            ModelError: the model is not supported, or its weights do not match it.
            KvPoolError: the memory holds no usable pool.
        """
        report = progress or (lambda _stage, _done: None)
        directory = model_dirs.load(model_dir)
        config = parse_config(directory.config)
        longest = model_len(config, max_model_len)
        max_tokens = max_num_batched_tokens or max(_MAX_TOKENS_PER_STEP, max_rows)
        backend = CpuBackend(config, block_size, max_tokens, longest, num_threads)
        num_blocks = KvPool.num_blocks(kv_memory_bytes, backend.block_bytes)
        model = _load_model(directory, config, backend, partial(report, "loading weights"))
        report("allocating blocks", 0.0)
        pool = KvPool(num_blocks, num_host_blocks, backend.block_bytes)
        backend.use_pool(pool)
        info = RunnerInfo(
            model_digest=directory.digest,
            model_name=directory.name,
            vocab_size=config.vocab_size,
            max_model_len=longest,
            block_size=block_size,
            num_device_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            max_rows=max_rows,
            max_num_batched_tokens=max_tokens,
            block_bytes=backend.block_bytes,
            device=backend.device,
        )
        runner = cls(info, model, backend, pool)
        report("compiling kernels", 0.0)
        runner._prepare(is_sized=max_num_batched_tokens is not None)
        report("ready", 1.0)
        return runner

    @property
    def pool(self) -> KvPool:
        """The blocks."""
        return self._pool

    @property
    def info(self) -> RunnerInfo:
        """See Runner."""
        return self._info

    def reset(self) -> None:
        """See Runner. Rows hold nothing that a new row could read."""

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> _FinishedStep:
        """See Runner. The step is done when this returns."""
        begin_ns = time.perf_counter_ns()
        self._move(plan)
        move_ns = time.perf_counter_ns() - begin_ns
        return _FinishedStep(self._step(state, batch, move_ns))

    def _move(self, plan: Plan) -> None:
        # Forks move no token: forked rows get every input from the scheduler.
        self._pool.swap_out(plan.swap_out)
        self._pool.copy(plan.copy)
        self._pool.swap_in(plan.swap_in)

    @torch.inference_mode()
    def _step(self, state: RowState, batch: StepBatch, move_ns: int = 0) -> StepOutputs:
        begin_ns = time.perf_counter_ns()
        idle_ns = begin_ns - self._last_end_ns - move_ns if self._last_end_ns else 0
        if not batch.rows.size and not batch.sampling_rows.size:
            return StepOutputs(token_ids=np.empty(0, np.int32), move_ns=move_ns)
        self._backend.use_threads()
        self._backend.begin_step(batch, state.block_table)
        residual = self._backend.embed(self._model.embedding, self._inputs(batch))
        hidden = self._model.forward(self._backend, residual)
        logits = self._model.logits(_select(hidden, batch.logits_indices))
        sample_begin_ns = time.perf_counter_ns()
        samples = self._sample(state, batch, logits.numpy())
        rows, positions = batch.sampling_rows, batch.sample_positions
        self._recent[rows, positions % _NUM_RECENT] = samples.token_ids
        end_ns = self._last_end_ns = time.perf_counter_ns()
        failed = rows[samples.is_failed].tolist()
        return StepOutputs(
            token_ids=samples.token_ids,
            failed_rows=[(row, pb.ROW_STATUS_NUMERIC) for row in failed],
            candidate_token_ids=samples.candidate_token_ids,
            candidate_logprobs=samples.candidate_logprobs,
            token_logprobs=samples.token_logprobs,
            forward_ns=sample_begin_ns - begin_ns,
            sample_ns=end_ns - sample_begin_ns,
            idle_ns=idle_ns,
            move_ns=move_ns,
        )

    def _inputs(self, batch: StepBatch) -> IntArray:
        """The step's token ids [T], with what the device sampled filled in."""
        token_ids = batch.token_ids
        is_sampled = token_ids == LAST_SAMPLED
        if not is_sampled.any():
            return token_ids
        # A sampled input is its row's only token: it stands at the row's last place.
        last_tokens = np.cumsum(batch.num_scheduled_tokens) - 1
        sampled = np.flatnonzero(is_sampled[last_tokens])
        recent = self._recent[batch.rows[sampled], batch.num_computed_tokens[sampled] % _NUM_RECENT]
        token_ids = token_ids.copy()
        token_ids[last_tokens[sampled]] = recent
        return token_ids

    def _sample(
        self, state: RowState, batch: StepBatch, logits: npt.NDArray[np.float32]
    ) -> Samples:
        rows = batch.sampling_rows
        params = SamplingParams(
            temperature=state.temperature[rows],
            top_k=state.top_k[rows],
            top_p=state.top_p[rows],
            min_p=state.min_p[rows],
            seeds=state.seeds[rows],
            branches=state.branches[rows],
            num_candidates=state.num_candidates[rows],
        )
        if (state.flags[rows] & pb.ROW_FLAG_HISTORY).any():
            sampler.apply_penalties(logits, self._penalties(state, batch))
        threads = self._backend.num_threads
        return sampler.sample(logits, params, batch.sample_positions, threads)

    def _penalties(self, state: RowState, batch: StepBatch) -> list[Penalties]:
        found = []
        for index, row in enumerate(batch.sampling_rows.tolist()):
            repetition = float(state.repetition_penalty[row]) or 1.0
            presence = float(state.presence_penalty[row])
            frequency = float(state.frequency_penalty[row])
            has_history = state.flags[row] & pb.ROW_FLAG_HISTORY
            if has_history and (repetition != 1.0 or presence or frequency):
                history = self._history(state, row, int(batch.sample_positions[index]))
                num_prompt_tokens = int(state.num_prompt_tokens[row])
                found.append(
                    Penalties(index, history, num_prompt_tokens, repetition, presence, frequency)
                )
        return found

    def _history(self, state: RowState, row: int, position: int) -> npt.NDArray[np.uint32]:
        """Ids of the positions [0, position): the host's, then those not on the host yet."""
        known = state.history(row)[:position]
        missing = np.arange(known.size, position)
        assert missing.size <= _NUM_RECENT, (row, position, known.size)
        recent = self._recent[row, missing % _NUM_RECENT].astype(np.uint32)
        return np.concatenate([known, recent])

    def _warm_up(self) -> None:
        """Compile the kernels, or read them from their cache, before the first request.

        Runs on the padding block: nothing there is ever read.
        """
        one: IntArray = np.ones(1, np.int32)
        row: IntArray = np.zeros(1, np.int32)
        # Long enough a context to be cut into parts and merged, if the model allows it.
        context = min(work.PART, self._info.max_model_len - 1)
        table: IntArray = np.zeros((1, context // self._info.block_size + 1), np.int32)
        batch = StepBatch(row, one, np.full(1, context, np.int32), 1, row, row, row, one)
        with torch.inference_mode():
            self._backend.begin_step(batch, table)
            residual = self._backend.embed(self._model.embedding, row)
            hidden = self._model.forward(self._backend, residual)
            logits = self._model.logits(hidden).numpy()
        params = SamplingParams(
            temperature=np.ones(1, np.float32),
            top_k=np.ones(1, np.uint32),
            top_p=np.full(1, 0.5, np.float32),
            min_p=np.zeros(1, np.float32),
            seeds=np.zeros(1, np.uint64),
            branches=np.zeros(1, np.uint32),
            num_candidates=np.ones(1, np.uint32),
        )
        sampler.sample(logits, params, one, self._backend.num_threads)

    def _prepare(self, *, is_sized: bool) -> None:
        """Make the first request as fast as any; choose the step's size if it is not set."""
        self._warm_up()
        if not is_sized:
            self._choose_tokens_per_step()

    def _choose_tokens_per_step(self) -> None:
        """Time prefill and bound the step by it, but let every row take part in one."""
        num_tokens = min(_TIMED_TOKENS, self._info.max_model_len)
        seconds = min(self._prefill_padding(num_tokens) for _ in range(2))
        chosen = max(tokens_per_step(num_tokens / seconds), self._info.max_rows)
        self._info = replace(self._info, max_num_batched_tokens=chosen)

    @torch.inference_mode()
    def _prefill_padding(self, num_tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes, on the padding block."""
        begin_s = time.perf_counter()
        row: IntArray = np.zeros(1, np.int32)
        counts: IntArray = np.full(1, num_tokens, np.int32)
        token_ids: IntArray = np.zeros(num_tokens, np.int32)
        table: IntArray = np.zeros((1, num_tokens // self._info.block_size + 1), np.int32)
        batch = StepBatch(row, counts, row, 0, token_ids, row, row, row)
        self._backend.begin_step(batch, table)
        self._model.forward(
            self._backend, self._backend.embed(self._model.embedding, batch.token_ids)
        )
        return time.perf_counter() - begin_s


def tokens_per_step(tokens_per_s: float) -> int:
    """Most tokens in a step, by the speed of prefill.

    A step delays every other stream, so it should not take long; but large steps are efficient.
    """
    fitting = int(_LONGEST_STEP_S * tokens_per_s) // _STEP_UNIT * _STEP_UNIT
    return min(max(fitting, _MIN_TOKENS_PER_STEP), _MAX_TOKENS_PER_STEP)


def _load_model(
    directory: ModelDir, config: ModelConfig, backend: CpuBackend, progress: Callable[[float], None]
) -> LlamaModel:
    backend.use_threads()
    files, codes_file = directory.weight_files, directory.codes_file
    with torch.inference_mode(), Weights(files, codes_file) as weights:
        model = load_llama(config, weights, backend, progress)
        backend.choose_products()
        return model


def _select(hidden: torch.Tensor, indices: IntArray) -> torch.Tensor:
    """hidden[indices]; no copy in a plain decode step, where every token samples."""
    if indices.size == len(hidden) and (np.diff(indices) == 1).all():
        return hidden
    return hidden.index_select(0, torch.from_numpy(indices))

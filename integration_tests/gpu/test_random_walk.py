"""Random walks over a GPU runner: every block holds what it should after every step.

Most walks have several steps under way on the GPU; see shadow.py.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from unittest import mock

import pytest
import torch

from executor_svc.backends.checking.runner import FakeRunner
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, Runner, StepBatch
from executor_svc.tests.models import tiny_config, write_model
from integration_tests import random_walk
from integration_tests.gpu.shadow import Known, ShadowRunner
from integration_tests.random_walk import Walk, WalkCounts
from integration_tests.walk_config import VOCAB_SIZE, random_limits
from scheduler_svc.limits import Limits

NUM_SEEDS = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    write_model(path, config, matrix_spread=0.1)
    return path


def gpu_limits(rng: random.Random) -> Limits:
    """As random_limits draws them, with blocks that the kernels have."""
    limits = random_limits(rng)
    block_size = rng.choice([16, 16, 32, 64])
    longest = limits.num_usable_blocks * block_size
    max_model_len = min(longest, rng.choice([40, 100, 200]))
    return dataclasses.replace(
        limits, block_size=block_size, max_model_len=max_model_len, block_bytes=8 * block_size
    )


class ShadowWalk(Walk):
    """A walk whose executors run on the GPU as well."""

    def __init__(self, seed: int, path: Path) -> None:
        self.path = path
        self.known = Known()
        self.delays = random.Random(seed)
        self.shadows: list[ShadowRunner] = []
        super().__init__(seed)

    def _runner(self) -> Runner:  # type: ignore[override]  # one of its kind
        self.compare()
        checking = super()._runner()
        assert isinstance(checking, FakeRunner)
        info = checking.info
        block_bytes = 2 * 2 * 64 * 2 * info.block_size
        options = CudaOptions(
            block_size=info.block_size,
            max_rows=info.max_rows,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            kv_memory_bytes=info.num_device_blocks * block_bytes,
            host_memory_bytes=info.num_host_blocks * block_bytes,
        )
        cuda = load_runner(self.path, options, lambda _stage, _done: None)
        self.shadows.append(ShadowRunner(checking, cuda, self.known, self.delays))
        return self.shadows[-1]

    def run(self) -> WalkCounts:
        """As Walk.run; also raises AssertionError where the GPU's blocks are wrong."""
        counts = super().run()
        self.compare()
        return counts

    def compare(self) -> None:
        """What was not compared yet."""
        for shadow in self.shadows:
            shadow.compare()


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_block_holds_what_it_should(
    seed: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_walk, "random_limits", gpu_limits)
    walk = ShadowWalk(seed, path)
    counts = walk.run()
    assert counts.requests >= 10
    assert sum(shadow.num_slots_checked for shadow in walk.shadows) > 1000


class SwapsForgotten(ShadowRunner):
    """A GPU runner that swaps nothing in."""

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """Without swap_in on the GPU."""
        launch = self._cuda.launch

        def without(plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
            none = dataclasses.replace(
                plan.swap_in, src=plan.swap_in.src[:0], dst=plan.swap_in.dst[:0]
            )
            return launch(dataclasses.replace(plan, swap_in=none), state, batch)

        self._cuda.launch = without  # type: ignore[method-assign, assignment]
        try:
            return super().launch(plan, state, batch)
        finally:
            del self._cuda.launch


class OrderForgotten(ShadowRunner):
    """A GPU runner in which copies to and from the host wait for nothing."""

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """Without what the stream of swaps waits for."""
        wait_event = torch.cuda.Stream.wait_event

        def forgetful(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
            if stream is not self._swaps:
                wait_event(stream, event)

        with mock.patch.object(torch.cuda.Stream, "wait_event", forgetful):
            return super().launch(plan, state, batch)


@pytest.mark.parametrize("wrong", [SwapsForgotten, OrderForgotten])
def test_the_walk_would_notice(
    path: Path, monkeypatch: pytest.MonkeyPatch, wrong: type[ShadowRunner]
) -> None:
    monkeypatch.setattr(random_walk, "random_limits", gpu_limits)
    monkeypatch.setattr("integration_tests.gpu.test_random_walk.ShadowRunner", wrong)
    with pytest.raises(AssertionError, match="slots are wrong"):
        _walk_all(path)


def _walk_all(path: Path) -> None:
    for seed in range(NUM_SEEDS):
        ShadowWalk(seed, path).run()

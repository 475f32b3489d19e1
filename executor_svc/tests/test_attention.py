"""The CPU backend's kernels against plain torch, on ragged batches over scattered blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from executor_svc.backends.cpu.backend import CpuBackend
from executor_svc.backends.cpu.work import PART, plan_items
from executor_svc.backends.reference import ReferenceBackend
from executor_svc.kv_pool import KvPool
from executor_svc.model.config import ModelConfig
from executor_svc.model.errors import UnsupportedModelError
from executor_svc.runner import IntArray, StepBatch
from executor_svc.tests.models import parsed

MAX_LEN = 1024
LAYER = 1


def make_batch(rows: Sequence[int], counts: Sequence[int], computed: Sequence[int]) -> StepBatch:
    batch_rows, num_scheduled, num_computed = (
        np.array(column, np.int32) for column in (rows, counts, computed)
    )
    return StepBatch(
        rows=batch_rows,
        num_scheduled_tokens=num_scheduled,
        num_computed_tokens=num_computed,
        num_decode_rows=0,
        token_ids=np.zeros(int(num_scheduled.sum()), np.int32),
        sampling_rows=batch_rows,
        logits_indices=(np.cumsum(num_scheduled) - 1).astype(np.int32),
        sample_positions=num_computed + num_scheduled,
    )


class Bench:
    """A backend with its pool, filled with NaN, and tables of blocks in a given order."""

    def __init__(self, backend: CpuBackend | ReferenceBackend, order: IntArray, width: int) -> None:
        self.backend = backend
        self.pool = KvPool(order.size + 1, 0, backend.block_bytes)
        self.pool.device[:] = np.nan
        backend.use_pool(self.pool)
        self.table = order.reshape(-1, width) + 1

    def step(self, batch: StepBatch, qkv: torch.Tensor) -> torch.Tensor:
        self.backend.begin_step(batch, self.table)
        mine = qkv.clone()
        self.backend.write_kv(LAYER, mine, None, None)
        return self.backend.attend(LAYER, mine).clone()


def scattered(num_rows: int, width: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).permutation(num_rows * width).astype(np.int32)


def random_qkv(config: ModelConfig, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, config.qkv_size, generator=generator)


def cpu(config: ModelConfig, block_size: int = 16, num_threads: int = 2) -> CpuBackend:
    return CpuBackend(config, block_size, 2048, MAX_LEN, num_threads)


# Prefill of all rows at once, chunks of odd lengths, then a mixed step, then decode steps.
LENGTHS = (1, 2, 15, 16, 17, 63, 255, 256, 257, 300)


def run_steps(bench: Bench, config: ModelConfig) -> list[torch.Tensor]:
    rows = list(range(len(LENGTHS)))
    outputs = []
    first = [min(length, 100) for length in LENGTHS]
    outputs.append(bench.step(make_batch(rows, first, [0] * 10), random_qkv(config, sum(first))))
    mixed = [(r, max(1, LENGTHS[r] - first[r]), first[r]) for r in rows]
    batch = make_batch(*zip(*mixed, strict=True))
    outputs.append(bench.step(batch, random_qkv(config, int(batch.token_ids.size), 1)))
    lengths = [computed + count for _, count, computed in mixed]
    for step in range(2):
        batch = make_batch(rows[::-1], [1] * 10, [length + step for length in lengths[::-1]])
        outputs.append(bench.step(batch, random_qkv(config, 10, 2 + step)))
    return outputs


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(4, 2, 32, 16), (3, 1, 64, 16), (9, 3, 64, 32), (2, 2, 128, 16), (8, 1, 96, 48)],
)
def test_every_step_equals_plain_torch(
    heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    config = parsed(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    width = -(-400 // block_size)
    order = scattered(len(LENGTHS), width)
    expected = run_steps(Bench(ReferenceBackend(config, block_size, MAX_LEN), order, width), config)
    actual = run_steps(Bench(cpu(config, block_size), order, width), config)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.isfinite(theirs).all()
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_where_blocks_lie_changes_no_bit() -> None:
    config = parsed(head_dim=64)
    first = run_steps(Bench(cpu(config), scattered(10, 25, 1), 25), config)
    second = run_steps(Bench(cpu(config), scattered(10, 25, 2), 25), config)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_number_of_threads_changes_no_bit() -> None:
    config = parsed(head_dim=64)
    alone = run_steps(Bench(cpu(config, num_threads=1), scattered(10, 25), 25), config)
    shared = run_steps(Bench(cpu(config, num_threads=2), scattered(10, 25), 25), config)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


def test_a_decode_row_does_not_depend_on_its_batch() -> None:
    config = parsed(head_dim=64)
    bench = Bench(cpu(config), scattered(4, 50), 50)
    lengths = [700, 20, 300, 513]
    bench.step(make_batch(range(4), lengths, [0] * 4), random_qkv(config, sum(lengths)))
    qkv = random_qkv(config, 4, 9)
    together = bench.step(make_batch(range(4), [1] * 4, lengths), qkv)
    for row in range(4):
        alone = bench.step(make_batch([row], [1], [lengths[row]]), qkv[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_a_row_with_nan_leaves_its_neighbours_alone() -> None:
    config = parsed(head_dim=64)
    bench = Bench(cpu(config), scattered(3, 25), 25)
    qkv = random_qkv(config, 90)
    batch = make_batch(range(3), [30] * 3, [0] * 3)
    clean = bench.step(batch, qkv)
    qkv[35] = torch.nan
    dirty = bench.step(batch, qkv)
    assert torch.equal(dirty[:30], clean[:30])
    assert torch.equal(dirty[60:], clean[60:])
    assert torch.isnan(dirty[35:60]).all()


def test_very_large_scores_do_not_overflow() -> None:
    config = parsed(head_dim=64)
    order = scattered(1, 25)
    qkv = random_qkv(config, 300) * 20
    batch = make_batch([0], [300], [0])
    ours = Bench(cpu(config), order, 25).step(batch, qkv)
    theirs = Bench(ReferenceBackend(config, 16, MAX_LEN), order, 25).step(batch, qkv)
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=1e-3)


def test_norms_and_activation_equal_plain_torch() -> None:
    config = parsed(rms_norm_eps=1e-3)
    ours, theirs = cpu(config), ReferenceBackend(config, 16, MAX_LEN)
    for num_tokens in (1, 15, 16, 40):
        x, delta = torch.randn(num_tokens, 96), torch.randn(num_tokens, 96)
        weight, gate_up = torch.randn(96), torch.randn(num_tokens, 320) * 20
        torch.testing.assert_close(ours.rms_norm(x, weight), theirs.rms_norm(x, weight))
        sums = [x.clone(), x.clone()]
        torch.testing.assert_close(
            ours.add_rms_norm(sums[0], delta, weight), theirs.add_rms_norm(sums[1], delta, weight)
        )
        assert torch.equal(sums[0], sums[1])
        torch.testing.assert_close(ours.silu_mul(gate_up), theirs.silu_mul(gate_up))


def test_head_norms_equal_plain_torch() -> None:
    config = parsed()
    q_norm, k_norm = torch.randn(32), torch.randn(32)
    outputs = []
    for backend in (cpu(config), ReferenceBackend(config, 16, MAX_LEN)):
        bench = Bench(backend, scattered(2, 4), 4)
        qkv = random_qkv(config, 50)
        backend.begin_step(make_batch([0, 1], [20, 30], [0, 0]), bench.table)
        backend.write_kv(LAYER, qkv, q_norm, k_norm)
        outputs.append((qkv, backend.attend(LAYER, qkv)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_work_covers_every_query_and_key_once() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        num_rows = int(rng.integers(1, 30))
        counts = np.where(rng.random(num_rows) < 0.6, 1, rng.integers(1, 90, num_rows))
        computed = rng.integers(0, 900, num_rows)
        threads, kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        rows = np.arange(num_rows)
        items, merges, begins = plan_items(rows, counts, computed, 8, kv_heads, threads)
        assert begins[0] == 0
        assert begins[-1] == len(items) * kv_heads
        assert (np.diff(begins) >= 0).all()
        lengths = np.concatenate(
            [done + 1 + np.arange(count) for done, count in zip(computed, counts, strict=True)]
        )
        covered: dict[int, list[tuple[int, int]]] = {}
        for token, count, row, position, begin, end, partial in items.tolist():
            assert position == lengths[token] - 1
            assert np.repeat(rows, counts)[token] == row
            assert partial < 0 or end - begin <= PART
            for offset in range(count):
                covered.setdefault(token + offset, []).append((begin, end))
        for token, spans in covered.items():
            spans.sort()
            assert spans[0][0] == 0
            assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
            # A query tile spans the context of its last query; earlier ones are masked.
            assert lengths[token] <= spans[-1][1] < lengths[token] + 8
        assert sorted(covered) == list(range(counts.sum()))
        assert merges[:, 2].sum() == (items[:, 6] >= 0).sum()


@pytest.mark.parametrize(
    ("changes", "block_size", "named"),
    [
        ({}, 8, "block_size"),
        ({"head_dim": 48}, 16, "head_dim"),
        ({"hidden_size": 100}, 16, "hidden_size"),
        ({"intermediate_size": 100}, 16, "intermediate_size"),
    ],
)
def test_sizes_that_vectors_do_not_divide_are_refused(
    changes: dict[str, int], block_size: int, named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        cpu(parsed(**changes), block_size)

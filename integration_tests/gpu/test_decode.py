"""Paged decode against plain torch: shapes, ragged batches, poison, invariance to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cupy_kernels.decode import (
    BATCH_INVARIANT,
    FAST,
    ChunkRule,
    Decode,
    DecodePlain,
    SplitPlanner,
    decode_variant,
)
from cupy_kernels.device import Device
from cupy_kernels.shape import AttentionShape
from cupy_kernels.source import Variant
from integration_tests.gpu.cases import (
    LAYER,
    Rows,
    make_rows,
    make_work,
    poisoned,
    random_elements,
    stream,
)
from integration_tests.gpu.oracles import attention, relative_error

MAX_ERROR = 4e-3
RAGGED = [0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 300, 0, 1024, 4097]

LLAMA_8B = AttentionShape(2, 32, 8, 128, 16)
SHAPES = [
    LLAMA_8B,
    AttentionShape(2, 32, 8, 128, 16, "float16"),
    AttentionShape(2, 9, 3, 64, 16),  # SmolLM2-135M
    AttentionShape(3, 28, 4, 128, 32),
    AttentionShape(2, 4, 4, 64, 64, "float16"),
    AttentionShape(2, 10, 2, 96, 16),
    AttentionShape(2, 16, 1, 96, 64),
    AttentionShape(2, 16, 1, 128, 32),
    AttentionShape(2, 24, 2, 64, 32, "float16"),
    AttentionShape(2, 8, 4, 256, 16),
    AttentionShape(2, 16, 1, 256, 64, "float16"),
    AttentionShape(2, 26, 2, 256, 32),
]


def label(shape: AttentionShape) -> str:
    heads = f"{shape.num_heads}over{shape.num_kv_heads}"
    return f"{heads}-dim{shape.head_dim}-block{shape.block_size}-{shape.element}"


class DecodeStep:
    """Plans and attends for rows; keeps its buffers for the next call."""

    def __init__(self, device: Device, rows: Rows, rule: ChunkRule = FAST) -> None:
        shape = rows.shape
        self.rows = rows
        self.work = make_work(device, shape, len(rows.lengths))
        self.planner = SplitPlanner(device, shape, rule)
        self.decode = Decode(device, shape)

    def __call__(self, query: Tensor, out: Tensor) -> None:
        rows = self.rows
        plan = self.planner.pack(rows=rows.rows, seq_lens=rows.seq_lens, work=self.work)
        attend = self.decode.pack(
            query=query,
            out=out,
            pool=rows.pool,
            layer=LAYER,
            block_table=rows.block_table,
            work=self.work,
        )
        for launch in (plan, attend):
            launch.run(stream())
        torch.cuda.synchronize()


def output(device: Device, rows: Rows, query: Tensor, rule: ChunkRule = FAST) -> Tensor:
    out = poisoned(rows.shape, len(rows.lengths), rows.shape.num_heads * rows.shape.head_dim)
    DecodeStep(device, rows, rule)(query, out)
    return out


def plain_output(device: Device, rows: Rows, query: Tensor) -> Tensor:
    out = poisoned(rows.shape, len(rows.lengths), rows.shape.num_heads * rows.shape.head_dim)
    launch = DecodePlain(device, rows.shape).pack(
        query=query,
        out=out,
        pool=rows.pool,
        layer=LAYER,
        block_table=rows.block_table,
        rows=rows.rows,
        seq_lens=rows.seq_lens,
    )
    launch.run(stream())
    torch.cuda.synchronize()
    return out


def assert_attends(rows: Rows, query: Tensor, out: Tensor) -> None:
    """Every row equals torch; rows of length 0 and guard rows are as they were."""
    shape = rows.shape
    assert torch.isnan(out[len(rows.lengths) :]).all()
    for i, length in enumerate(rows.lengths):
        if length == 0:
            assert torch.isnan(out[i]).all()
            continue
        expected = attention(query[i : i + 1, : out.shape[1]], rows.contexts[i], shape)
        assert relative_error(out[i : i + 1], expected) <= MAX_ERROR, (i, length)


def queries(rows: Rows, seed: int) -> Tensor:
    """Packed qkv rows, so that query rows are strided."""
    return random_elements(rows.shape, len(rows.lengths), rows.shape.qkv_size, seed=seed)


@pytest.mark.parametrize("attend", [output, plain_output])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_ragged_batches_equal_torch(
    device: Device, shape: AttentionShape, attend: Callable[[Device, Rows, Tensor], Tensor]
) -> None:
    rows = make_rows(shape, RAGGED, seed=1)
    query = queries(rows, 2)
    assert_attends(rows, query, attend(device, rows, query))


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_copies_without_a_copy_engine(
    device: Device, shape: AttentionShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_engine(shape: AttentionShape, max_shared_bytes: int) -> Variant:
        variant = decode_variant(shape, max_shared_bytes)
        return dataclasses.replace(variant, defines={**variant.defines, "USE_COPY_ENGINE": 0})

    monkeypatch.setattr("cupy_kernels.decode.decode_variant", without_engine)
    rows = make_rows(shape, RAGGED, seed=24)
    query = queries(rows, 25)
    assert_attends(rows, query, output(device, rows, query))


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 200])
def test_random_batches_equal_torch(device: Device, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    lengths = np.exp(rng.uniform(0, np.log(9000), num_rows)).astype(int).tolist()
    rows = make_rows(LLAMA_8B, lengths, seed=num_rows)
    query = queries(rows, 3)
    assert_attends(rows, query, output(device, rows, query))


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_where_blocks_lie_changes_no_bit(device: Device, shape: AttentionShape) -> None:
    outputs = []
    for placement in range(3):
        rows = make_rows(shape, RAGGED, seed=4, placement=placement)
        outputs.append(output(device, rows, queries(rows, 5)).view(torch.int16))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_repeats_change_no_bit(device: Device) -> None:
    rows = make_rows(LLAMA_8B, [3000, 8192, 5, 700], seed=6)
    query = queries(rows, 7)
    step = DecodeStep(device, rows)
    outputs = []
    for _ in range(20):
        out = poisoned(LLAMA_8B, len(rows.lengths), 32 * 128)
        step(query, out)
        assert int(step.work.arrivals.abs().sum()) == 0  # type: ignore[attr-defined]
        outputs.append(out.view(torch.int16))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_one_plan_serves_many_layers(device: Device) -> None:
    rows = make_rows(LLAMA_8B, [3000, 60], seed=8)
    step = DecodeStep(device, rows)
    first = poisoned(LLAMA_8B, 2, 32 * 128)
    query = queries(rows, 9)
    step(query, first)
    for seed in range(3):
        query, out = queries(rows, 10 + seed), poisoned(LLAMA_8B, 2, 32 * 128)
        launch = step.decode.pack(
            query=query,
            out=out,
            pool=rows.pool,
            layer=LAYER,
            block_table=rows.block_table,
            work=step.work,
        )
        launch.run(stream())
        torch.cuda.synchronize()
        assert_attends(rows, query, out)


def test_the_number_of_splits_hardly_matters(device: Device) -> None:
    rows = make_rows(LLAMA_8B, [9000, 33, 1500], seed=14)
    query = queries(rows, 15)
    outputs = []
    for tiles in (10**6, 40, 5, 3):
        rule = ChunkRule(tiles, tiles)
        outputs.append(output(device, rows, query, rule)[:3].float())
    for other in outputs[1:]:
        assert relative_error(other, outputs[0]) <= 3e-3


def test_batch_invariant_chunks_give_the_same_bits_in_any_batch(device: Device) -> None:
    lengths = [3000, 17, 600, 513, 8000]
    rows = make_rows(LLAMA_8B, lengths, seed=16)
    query = queries(rows, 17)
    together = output(device, rows, query, BATCH_INVARIANT)
    for i in range(len(lengths)):
        alone = dataclasses.replace(
            rows,
            lengths=lengths[i : i + 1],
            rows=rows.rows[i : i + 1].clone(),
            seq_lens=rows.seq_lens[i : i + 1].clone(),
        )
        out = output(device, alone, query[i : i + 1].clone(), BATCH_INVARIANT)
        assert torch.equal(out[0].view(torch.int16), together[i].view(torch.int16))


def test_a_row_with_nan_leaves_its_neighbours_alone(device: Device) -> None:
    rows = make_rows(LLAMA_8B, [500, 500, 500], seed=18)
    query = queries(rows, 19)
    clean = output(device, rows, query)
    query[1, 5] = torch.nan
    dirty = output(device, rows, query)
    assert torch.equal(clean[[0, 2]], dirty[[0, 2]])
    assert torch.isnan(dirty[1, :128]).all()


def test_very_large_scores_do_not_overflow(device: Device) -> None:
    rows = make_rows(LLAMA_8B, [1000, 40], seed=20)
    query = queries(rows, 21) * 200
    assert_attends(rows, query, output(device, rows, query))


def replace_lengths(rows: Rows, lengths: Sequence[int]) -> Rows:
    rows.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
    contexts = [c[:n] for c, n in zip(rows.contexts, lengths, strict=True)]
    return dataclasses.replace(rows, lengths=list(lengths), contexts=contexts)


def test_a_captured_graph_serves_other_lengths(device: Device) -> None:
    longest = [2000, 2000, 4000, 100]
    rows = make_rows(LLAMA_8B, longest, seed=22)
    step = DecodeStep(device, rows)
    query, out = queries(rows, 23), poisoned(LLAMA_8B, 4, 32 * 128)
    step(query, out)
    plan = step.planner.pack(rows=rows.rows, seq_lens=rows.seq_lens, work=step.work)
    attend = step.decode.pack(
        query=query,
        out=out,
        pool=rows.pool,
        layer=LAYER,
        block_table=rows.block_table,
        work=step.work,
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(stream())
        attend.run(stream())
    for lengths in (longest, [1, 0, 3999, 0], [2000, 16, 0, 100], [0, 0, 0, 0], [7, 7, 7, 7]):
        out.fill_(torch.nan)
        now = replace_lengths(rows, lengths)
        query.copy_(queries(rows, sum(lengths)))
        graph.replay()
        torch.cuda.synchronize()
        # Tokens past the new length are still in the cache: they must not be seen.
        assert_attends(now, query, out)

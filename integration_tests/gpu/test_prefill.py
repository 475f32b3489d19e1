"""Paged prefill against plain torch: whole prompts, chunks, short runs on long contexts.

Both kernels take all tests on Hopper; elsewhere there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cupy_kernels.device import Device
from cupy_kernels.prefill import (
    Prefill,
    PrefillKernel,
    plain_prefill,
    prefill_items,
    wgmma_prefill,
)
from cupy_kernels.shape import AttentionShape
from integration_tests.gpu.cases import LAYER, Rows, make_rows, poisoned, random_elements, stream
from integration_tests.gpu.oracles import attention, relative_error
from integration_tests.gpu.test_decode import LLAMA_8B, MAX_ERROR, SHAPES, label
from integration_tests.gpu.test_decode import output as decode_output

# (new tokens, computed tokens before them)
RUNS = [(1, 0), (2, 0), (15, 1), (16, 16), (64, 0), (65, 63), (100, 37), (300, 0), (5, 1000)]
RUNS += [(129, 500), (1, 777), (32, 31)]
# Around a span of 128 tokens, and its last tile.
RUNS += [(1, 127), (2, 127), (128, 0), (127, 1), (128, 128), (1, 128), (113, 399), (256, 0)]

MORE_SHAPES = [
    AttentionShape(2, 4, 4, 128, 16),
    AttentionShape(2, 6, 2, 128, 64, "float16"),
    AttentionShape(2, 7, 1, 64, 16),
    AttentionShape(2, 32, 2, 64, 16),
    AttentionShape(2, 8, 2, 64, 32),
]


@pytest.fixture(params=["plain", "wgmma"])
def kernel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def kernel_of(name: str, device: Device, shape: AttentionShape) -> PrefillKernel:
    """Skips the test if the kernel is not for the device or the shape."""
    if name == "plain":
        return plain_prefill(shape)
    if device.capability != (9, 0) or shape.head_dim not in (64, 128):
        pytest.skip("wgmma is for Hopper, and head_dim 64 and 128")
    return wgmma_prefill(shape)


class Step:
    """Runs of new tokens, laid out as a batch; every row's keys and values are in the cache."""

    def __init__(self, rows: Rows, new: list[int], computed: list[int], seed: int) -> None:
        self.rows, self.new, self.computed = rows, new, computed
        self.query = random_elements(rows.shape, sum(new), rows.shape.qkv_size, seed=seed)

    def run(self, device: Device, kernel: str) -> Tensor:
        rows, shape = self.rows, self.rows.shape
        choice = kernel_of(kernel, device, shape)
        columns = (rows.rows.cpu().numpy(), self.new, self.computed)
        items = prefill_items(shape, *(np.array(column, np.int32) for column in columns))
        out = poisoned(shape, sum(self.new), shape.num_heads * shape.head_dim)
        launch = Prefill(device, shape, choice).pack(
            query=self.query,
            out=out,
            pool=rows.pool,
            layer=LAYER,
            block_table=rows.block_table,
            items=torch.from_numpy(items).cuda(),
        )
        launch.run(stream())
        torch.cuda.synchronize()
        return out

    def expected(self) -> list[Tensor]:
        found, begin = [], 0
        shape = self.rows.shape
        width = shape.num_heads * shape.head_dim
        for context, new, computed in zip(self.rows.contexts, self.new, self.computed, strict=True):
            visible = computed + 1 + torch.arange(new, device="cuda")
            query = self.query[begin : begin + new, :width]
            found.append(attention(query, context, shape, visible))
            begin += new
        return found


def make_step(
    shape: AttentionShape, runs: list[tuple[int, int]], seed: int, placement: int = 0
) -> Step:
    rows = make_rows(shape, [new + computed for new, computed in runs], seed, placement)
    return Step(rows, [new for new, _ in runs], [computed for _, computed in runs], seed + 1)


@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=label)
def test_ragged_runs_equal_torch(device: Device, shape: AttentionShape, kernel: str) -> None:
    step = make_step(shape, RUNS, seed=1)
    out = step.run(device, kernel)
    assert torch.isnan(out[sum(step.new) :]).all()
    begin = 0
    for new, computed, expected in zip(step.new, step.computed, step.expected(), strict=True):
        for token in {0, new // 2, new - 1}:
            actual = out[begin + token]
            assert relative_error(actual, expected[token]) <= MAX_ERROR, (new, computed, token)
        assert relative_error(out[begin : begin + new], expected) <= MAX_ERROR, (new, computed)
        begin += new


@pytest.mark.parametrize("seed", range(4))
def test_random_runs_equal_torch(device: Device, seed: int, kernel: str) -> None:
    rng = np.random.default_rng(seed)
    runs = list(zip(*rng.integers((1, 0), (700, 3000), (9, 2)).T.tolist(), strict=True))
    step = make_step(LLAMA_8B, runs, seed)
    out = step.run(device, kernel)[: sum(step.new)]
    assert relative_error(out, torch.cat(step.expected())) <= MAX_ERROR


@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=label)
def test_where_blocks_lie_changes_no_bit(
    device: Device, shape: AttentionShape, kernel: str
) -> None:
    outputs = [
        make_step(shape, RUNS, seed=2, placement=placement).run(device, kernel).view(torch.int16)
        for placement in (0, 1, 2, 0)
    ]
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)


@pytest.mark.parametrize("shape", [LLAMA_8B, SHAPES[2], SHAPES[3]], ids=label)
def test_both_kernels_agree(device: Device, shape: AttentionShape) -> None:
    runs = [(700, 0), (1, 5000), (33, 2000), (300, 300), (5, 0)] * 2
    step = make_step(shape, runs, seed=7)
    wgmma, plain = (step.run(device, name)[: sum(step.new)] for name in ("wgmma", "plain"))
    assert relative_error(wgmma, plain) <= 3e-3


@pytest.mark.parametrize("shape", [LLAMA_8B, SHAPES[2]], ids=label)
def test_chunks_give_what_one_run_gives(device: Device, shape: AttentionShape, kernel: str) -> None:
    whole = make_step(shape, [(1000, 0)], seed=3)
    expected = whole.run(device, kernel)[:1000].float()
    outputs = []
    for begin, end in ((0, 128), (128, 129), (129, 640), (640, 1000)):
        chunk = Step(whole.rows, [end - begin], [begin], seed=0)
        chunk.query = whole.query[begin:end].clone()
        outputs.append(chunk.run(device, kernel)[: end - begin].float())
    assert relative_error(torch.cat(outputs), expected) <= 2e-3


def test_one_new_token_gives_what_decode_gives(device: Device, kernel: str) -> None:
    lengths = [1, 16, 500, 4000]
    step = make_step(LLAMA_8B, [(1, length - 1) for length in lengths], seed=4)
    decoded = decode_output(device, step.rows, step.query)[: len(lengths)].float()
    out = step.run(device, kernel)[: len(lengths)].float()
    assert relative_error(out, decoded) <= 3e-3


def test_a_row_with_nan_leaves_its_neighbours_alone(device: Device, kernel: str) -> None:
    step = make_step(LLAMA_8B, [(40, 0), (40, 10), (40, 0)], seed=5)
    clean = step.run(device, kernel)
    step.query[45, 0] = torch.nan
    dirty = step.run(device, kernel)
    others = [i for i in range(120) if i != 45]
    assert torch.equal(clean[others], dirty[others])
    assert torch.isnan(dirty[45, :128]).all()


def test_very_large_scores_do_not_overflow(device: Device, kernel: str) -> None:
    step = make_step(LLAMA_8B, [(300, 5)], seed=6)
    step.query *= 200
    assert relative_error(step.run(device, kernel)[:300], step.expected()[0]) <= MAX_ERROR

"""Ragged batches over scattered blocks of a pool whose unused slots are NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cupy_kernels.decode import DecodeWork, item_capacity
from cupy_kernels.device import Device
from cupy_kernels.shape import AttentionShape
from integration_tests.gpu.oracles import element_type, scatter, slots_of

GUARD_ROWS = 3
LAYER = 1


def stream() -> int:
    """The raw handle of torch's current stream."""
    return torch.cuda.current_stream().cuda_stream


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows with contexts in a pool, one layer of it."""

    shape: AttentionShape
    lengths: list[int]
    pool: Tensor  # [num_blocks, block_bytes] uint8
    block_table: Tensor  # [max_rows, max_blocks] int32; places past a row's blocks hold garbage
    rows: Tensor  # [n] int32
    seq_lens: Tensor  # [n] int32
    contexts: list[Tensor]  # of each row, [seq_len, kv_heads, 2, head_dim]


def make_rows(
    shape: AttentionShape, lengths: Sequence[int], seed: int = 0, placement: int = 0
) -> Rows:
    """Contexts depend on `seed` only, where their blocks lie on `placement` too."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = element_type(shape)
    counts = [-(-length // shape.block_size) for length in lengths]
    num_blocks, width = sum(counts) + 3, max([*counts, 1]) + 2
    pool = torch.full((num_blocks, shape.block_bytes // 2), torch.nan, dtype=dtype, device="cuda")
    pool = pool.view(torch.uint8)
    layout = torch.Generator().manual_seed(1000 + placement)
    # Block 0 is the padding block.
    ids = (torch.randperm(num_blocks - 1, generator=layout) + 1).to("cuda", torch.int32)
    order = torch.randperm(len(lengths) + 2, generator=layout)[: len(lengths)]
    table = torch.full((len(lengths) + 2, width), 2**31 - 1, dtype=torch.int32, device="cuda")
    contexts = []
    for row, length, count in zip(order.tolist(), lengths, counts, strict=True):
        table[row, :count], ids = ids[:count], ids[count:]
        size = (length, shape.num_kv_heads, 2, shape.head_dim)
        context = torch.randn(size, generator=generator, device="cuda").to(dtype)
        scatter(pool, slots_of(table[row], length, shape.block_size), context, shape, LAYER)
        contexts.append(context)
    return Rows(
        shape=shape,
        lengths=list(lengths),
        pool=pool,
        block_table=table,
        rows=order.to("cuda", torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        contexts=contexts,
    )


def random_elements(shape: AttentionShape, *size: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(size, generator=generator, device="cuda").to(element_type(shape))


def poisoned(shape: AttentionShape, num_rows: int, width: int) -> Tensor:
    """NaN, with GUARD_ROWS rows behind that nothing may touch."""
    size = (num_rows + GUARD_ROWS, width)
    return torch.full(size, torch.nan, dtype=element_type(shape), device="cuda")


def make_work(
    device: Device, shape: AttentionShape, num_rows: int, capacity: int = 0
) -> DecodeWork:
    """Work memory, poisoned; `capacity` 0: the usual."""
    capacity = capacity or item_capacity(num_rows, shape.num_kv_heads, device.num_sms)
    partials = (capacity, shape.group)
    return DecodeWork(
        items=torch.full((capacity, 8), -1, dtype=torch.int32, device="cuda"),
        partial_out=torch.full((*partials, shape.head_dim), torch.nan, device="cuda"),
        partial_norms=torch.full((*partials, 2), torch.nan, device="cuda"),
        arrivals=torch.full((num_rows, shape.num_kv_heads), 77, dtype=torch.int32, device="cuda"),
    )

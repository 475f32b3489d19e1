"""Steps of a model over a large paged pool, for timing: every layer's cache is read from memory.

A graph of a step holds one launch per layer, and each layer has its own cache, so that what a
launch reads was last touched 31 launches ago and has left the second-level cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cupy_kernels.decode import Decode, DecodeWork, SplitPlanner, item_capacity
from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.prefill import Prefill, PrefillKernel, prefill_items
from cupy_kernels.sample import Sample, SamplingColumns
from cupy_kernels.shape import AttentionShape
from cupy_kernels.write_kv import WriteKv


@dataclass(frozen=True, slots=True)
class Pool:
    """Blocks of random elements."""

    shape: AttentionShape
    blocks: Tensor  # [num_blocks, block_bytes] uint8

    @classmethod
    def random(cls, shape: AttentionShape, num_blocks: int) -> Pool:
        """Normally distributed, so that scores are as a model's."""
        size = num_blocks * shape.block_bytes // 2
        elements = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        for part in elements.split(1 << 28):  # type: ignore[no-untyped-call]
            part.normal_()
        return cls(shape, elements.view(torch.uint8).view(num_blocks, shape.block_bytes))

    def table(self, lengths: Sequence[int]) -> Tensor:
        """A block table [n, max_blocks] int32 of blocks in random order, none used twice."""
        counts = [-(-length // self.shape.block_size) for length in lengths]
        ids = torch.randperm(len(self.blocks) - 1)[: sum(counts)].int() + 1
        assert len(ids) == sum(counts), "the pool is too small"
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, part in enumerate(ids.split(counts)):  # type: ignore[no-untyped-call]
            table[row, : len(part)] = part
        return table.cuda()


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Launches of one decode step; `keep` holds the memory that they use."""

    plan: Launch
    write: list[Launch]
    attend: list[Launch]
    kv_bytes: int  # read per layer
    keep: tuple[object, ...]


def int32(values: Sequence[int]) -> Tensor:
    """On the device."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def random_qkv(shape: AttentionShape, num_tokens: int) -> Tensor:
    """[num_tokens, qkv_size] bfloat16."""
    return torch.randn(num_tokens, shape.qkv_size, device="cuda").bfloat16()


def decode_work(device: Device, shape: AttentionShape, num_rows: int) -> DecodeWork:
    """Memory for a step of num_rows rows."""
    capacity = item_capacity(num_rows, shape.num_kv_heads, device.num_sms)
    return DecodeWork(
        items=torch.empty(capacity, 8, dtype=torch.int32, device="cuda"),
        partial_out=torch.empty(capacity, shape.group, shape.head_dim, device="cuda"),
        partial_norms=torch.empty(capacity, shape.group, 2, device="cuda"),
        arrivals=torch.empty(num_rows, shape.num_kv_heads, dtype=torch.int32, device="cuda"),
    )


def decode_step(device: Device, pool: Pool, lengths: Sequence[int]) -> DecodeStep:
    """All layers of a step whose rows have these lengths; already planned."""
    shape = pool.shape
    table, work = pool.table(lengths), decode_work(device, shape, len(lengths))
    rows, seq_lens = int32(range(len(lengths))), int32(lengths)
    plan = SplitPlanner(device, shape).pack(rows=rows, seq_lens=seq_lens, work=work)
    plan.run(torch.cuda.current_stream().cuda_stream)
    qkv = random_qkv(shape, len(lengths))
    out = torch.empty(len(lengths), shape.num_heads * shape.head_dim, device="cuda").bfloat16()
    positions = seq_lens - 1
    ends = table.gather(1, (positions // shape.block_size).long()[:, None])[:, 0]
    slots = ends * shape.block_size + positions % shape.block_size
    angles = torch.randn(max(lengths), shape.head_dim, device="cuda")
    write_kv, decode = WriteKv(device, shape, 1e-5), Decode(device, shape)
    write = [
        write_kv.pack(
            qkv=qkv,
            angles=angles,
            positions=positions,
            slot_mapping=slots,
            pool=pool.blocks,
            layer=layer,
        )
        for layer in range(shape.num_layers)
    ]
    attend = [
        decode.pack(query=qkv, out=out, pool=pool.blocks, layer=layer, block_table=table, work=work)
        for layer in range(shape.num_layers)
    ]
    kv_bytes = sum(lengths) * shape.num_kv_heads * shape.head_dim * 4
    keep = (table, work, rows, seq_lens, qkv, out, positions, slots, angles)
    return DecodeStep(plan, write, attend, kv_bytes, keep)


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """Launches of one prefill step by each kernel; `keep` holds the memory that they use."""

    attend: dict[str, list[Launch]]
    flops: float  # per layer
    keep: tuple[object, ...]


def prefill_step(
    device: Device,
    pool: Pool,
    kernels: Mapping[str, PrefillKernel],
    num_rows: int,
    new: int,
    computed: int,
) -> PrefillStep:
    """All layers of a step of equal rows, `new` tokens after `computed` ones each."""
    shape = pool.shape
    table = pool.table([new + computed] * num_rows)
    columns = (np.arange(num_rows), np.full(num_rows, new), np.full(num_rows, computed))
    items = prefill_items(shape, *(column.astype(np.int32) for column in columns))
    device_items = torch.from_numpy(items).cuda()
    qkv = random_qkv(shape, num_rows * new)
    out = torch.empty(len(qkv), shape.num_heads * shape.head_dim, device="cuda").bfloat16()

    def launches(kernel: PrefillKernel) -> list[Launch]:
        prefill = Prefill(device, shape, kernel)
        return [
            prefill.pack(
                query=qkv,
                out=out,
                pool=pool.blocks,
                layer=layer,
                block_table=table,
                items=device_items,
            )
            for layer in range(shape.num_layers)
        ]

    attend = {name: launches(kernel) for name, kernel in kernels.items()}
    pairs = new * computed + new * (new + 1) / 2
    flops = 4 * shape.head_dim * shape.num_heads * num_rows * pairs
    return PrefillStep(attend, flops, (table, device_items, qkv, out))


def sampler_launch(
    device: Device,
    logits: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
) -> tuple[Launch, tuple[object, ...]]:
    """A draw from all rows of logits [n, vocab_size], and the memory that it uses."""
    size = len(logits)
    columns = SamplingColumns(
        temperature=torch.full((size,), temperature, device="cuda"),
        top_k=int32([top_k] * size),
        top_p=torch.full((size,), top_p, device="cuda"),
        min_p=torch.zeros(size, device="cuda"),
        seeds=torch.arange(size, device="cuda"),
        branches=int32([0] * size),
        positions=int32(range(size)),
    )
    results = torch.empty(2, size, dtype=torch.int32, device="cuda")
    launch = Sample(device, "bfloat16").pack(
        logits=logits,
        vocab_size=vocab_size,
        columns=columns,
        token_ids=results[0],
        status=results[1],
    )
    return launch, (columns, results, logits)

"""The attention kernels in plain torch, float32, and access to blocks through the layout's twin."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cupy_kernels.shape import TILE_TOKENS, AttentionShape, element_offsets


def element_type(shape: AttentionShape) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, shape.element)
    return dtype


def tiles_of(pool: Tensor, shape: AttentionShape) -> Tensor:
    """pool [num_blocks, block_bytes] uint8 as elements [blocks, layers, kv_heads, tiles, tile]."""
    sizes = (shape.num_layers, shape.num_kv_heads, shape.block_size // TILE_TOKENS)
    return pool.view(element_type(shape)).view(len(pool), *sizes, shape.tile_bytes // 2)


@functools.cache
def _offsets(head_dim: int) -> Tensor:
    return torch.from_numpy(element_offsets(head_dim)).cuda()


def _places(slots: Tensor, shape: AttentionShape, layer: int) -> tuple[Tensor | int | slice, ...]:
    """Index of tiles_of's result that gives [n, kv_heads, 2, head_dim] for slots [n]."""
    slots = slots.long()
    heads = torch.arange(shape.num_kv_heads, device=slots.device)[:, None, None]
    blocks, offsets = slots // shape.block_size, slots % shape.block_size
    elements = _offsets(shape.head_dim)[:, offsets % TILE_TOKENS].transpose(0, 1)[:, None]
    expand = (slice(None), None, None, None)
    return blocks[expand], layer, heads, (offsets // TILE_TOKENS)[expand], elements


def gather(pool: Tensor, slots: Tensor, shape: AttentionShape, layer: int) -> Tensor:
    """Keys and values [n, kv_heads, 2, head_dim] of slots [n]."""
    return tiles_of(pool, shape)[_places(slots, shape, layer)]


def scatter(pool: Tensor, slots: Tensor, kv: Tensor, shape: AttentionShape, layer: int) -> None:
    """Store kv [n, kv_heads, 2, head_dim] in slots [n]."""
    tiles_of(pool, shape)[_places(slots, shape, layer)] = kv


def slots_of(block_ids: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Slots [seq_len] of a row whose block table is block_ids [blocks]."""
    positions = torch.arange(seq_len, device=block_ids.device)
    return block_ids.long()[positions // block_size] * block_size + positions % block_size


def rotated(heads: Tensor, angles: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of float32 heads [T, n, head_dim]; angles [positions, head_dim]."""
    cosines, sines = angles[positions.long(), None].chunk(2, dim=-1)
    low, high = heads.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def normed(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm of float32 heads [T, n, head_dim]."""
    if weight is None:
        return heads
    scale = torch.rsqrt(heads.pow(2).mean(dim=-1, keepdim=True) + eps)
    return heads * scale * weight.float()


def split_qkv(qkv: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, heads, head_dim] of queries, keys and values."""
    heads = qkv.view(len(qkv), -1, shape.head_dim)
    keys, values = shape.num_heads, shape.num_heads + shape.num_kv_heads
    return heads[:, :keys], heads[:, keys:values], heads[:, values:]


def attention(
    query: Tensor, kv: Tensor, shape: AttentionShape, num_visible: Tensor | None = None
) -> Tensor:
    """Float32 [n, num_heads * head_dim] of query [n, num_heads * head_dim] over kv.

    kv is [seq_len, kv_heads, 2, head_dim]; query i sees its first num_visible[i] tokens, or all.
    """
    keys, values = kv.float().repeat_interleave(shape.group, dim=1).unbind(dim=2)
    queries = query.float().view(len(query), shape.num_heads, shape.head_dim)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * shape.head_dim**-0.5
    if num_visible is not None:
        tokens = torch.arange(len(kv), device=kv.device)
        scores = scores.masked_fill(tokens >= num_visible[:, None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).flatten(1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN if anything is NaN."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())

"""Rotation, head norms and the KV cache write against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cupy_kernels.device import Device
from cupy_kernels.shape import AttentionShape
from cupy_kernels.write_kv import WriteKv
from integration_tests.gpu.cases import LAYER, random_elements, stream
from integration_tests.gpu.oracles import gather, normed, rotated, split_qkv
from integration_tests.gpu.test_decode import SHAPES, label

EPS = 1e-5
MAX_POSITIONS = 700


def angle_table(head_dim: int) -> Tensor:
    frequencies = 1 / 10000 ** (np.arange(0, head_dim, 2) / head_dim)
    radians = np.outer(np.arange(MAX_POSITIONS), frequencies)
    table = np.concatenate([np.cos(radians), np.sin(radians)], axis=1)
    return torch.from_numpy(table.astype(np.float32)).cuda()


def in_order(values: Tensor) -> Tensor:
    """Integers such that neighbouring floats of 16 bits are neighbours."""
    bits = values.view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within one unit in the last place of `expected` (float32), rounded to the element type."""
    distance = (in_order(actual) - in_order(expected.to(actual.dtype))).abs()
    # Where two products cancel, float32's own rounding is more than a unit.
    cancelled = (actual.float() - expected).abs() < 1e-5
    assert not (distance[~cancelled] > 1).any()


class Case:
    """A step's packed qkv, and where its tokens go: scattered slots, some tokens nowhere."""

    def __init__(self, shape: AttentionShape, num_tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_blocks = num_tokens // shape.block_size + 4
        slots = torch.randperm((num_blocks - 1) * shape.block_size, generator=generator)
        self.slots = (slots[:num_tokens] + shape.block_size).to("cuda", torch.int32)
        is_stored = torch.rand(num_tokens, generator=generator) > 0.1
        self.is_stored = is_stored.cuda()
        self.slot_mapping = torch.where(self.is_stored, self.slots, -1)
        positions = torch.randint(MAX_POSITIONS, (num_tokens,), generator=generator)
        self.positions = positions.to("cuda", torch.int32)
        self.qkv = random_elements(shape, num_tokens, shape.qkv_size, seed=seed)
        self.pool = torch.full(
            (num_blocks, shape.block_bytes), 0x7F, dtype=torch.uint8, device="cuda"
        )
        self.angles = angle_table(shape.head_dim)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_equals_torch(device: Device, shape: AttentionShape, has_norms: bool) -> None:
    kernel = WriteKv(device, shape, EPS)
    for num_tokens in (1, 5, 33, 300):
        case = Case(shape, num_tokens, seed=num_tokens)
        norms = [
            random_elements(shape, shape.head_dim, seed=seed) if has_norms else None
            for seed in (1, 2)
        ]
        before = case.pool.clone()
        qkv = case.qkv.clone()
        launch = kernel.pack(
            qkv=qkv,
            angles=case.angles,
            positions=case.positions,
            slot_mapping=case.slot_mapping,
            pool=case.pool,
            layer=LAYER,
            q_norm=norms[0],
            k_norm=norms[1],
        )
        launch.run(stream())
        torch.cuda.synchronize()

        query, key, value = split_qkv(case.qkv, shape)
        got_query, got_key, got_value = split_qkv(qkv, shape)
        heads = [
            rotated(normed(part.float(), norm, EPS), case.angles, case.positions)
            for part, norm in zip((query, key), norms, strict=True)
        ]
        assert_close(got_query, heads[0])
        assert torch.equal(got_key, key)
        assert torch.equal(got_value, value)
        stored = gather(case.pool, case.slots[case.is_stored], shape, LAYER)
        assert_close(stored[:, :, 0], heads[1][case.is_stored])
        assert torch.equal(stored[:, :, 1], value[case.is_stored])
        assert count_changed(before, case.pool) <= stored.numel() * 2


def count_changed(before: Tensor, after: Tensor) -> int:
    """Bytes that differ: nothing but the stored slots may."""
    return int((before != after).sum())


def test_padding_tokens_store_nothing(device: Device) -> None:
    shape = SHAPES[0]
    case = Case(shape, 20, seed=3)
    before = case.pool.clone()
    launch = WriteKv(device, shape, EPS).pack(
        qkv=case.qkv,
        angles=case.angles,
        positions=case.positions,
        slot_mapping=torch.full_like(case.slots, -1),
        pool=case.pool,
        layer=0,
    )
    launch.run(stream())
    torch.cuda.synchronize()
    assert torch.equal(before, case.pool)


def test_other_layers_and_slots_stay_as_they_are(device: Device) -> None:
    shape = AttentionShape(3, 4, 2, 64, 16)
    case = Case(shape, 1, seed=4)
    before = case.pool.clone()
    launch = WriteKv(device, shape, EPS).pack(
        qkv=case.qkv,
        angles=case.angles,
        positions=case.positions,
        slot_mapping=case.slots,
        pool=case.pool,
        layer=1,
    )
    launch.run(stream())
    torch.cuda.synchronize()
    changed = (before != case.pool).nonzero()
    assert set(changed[:, 0].tolist()) == {int(case.slots[0]) // 16}
    assert int(changed[:, 1].min()) >= shape.layer_bytes
    assert int(changed[:, 1].max()) < 2 * shape.layer_bytes
    assert len(changed) <= 2 * 2 * 64 * 2

"""Block copies, byte for byte."""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.copy_blocks import CopyBlocks
from cupy_kernels.device import Device
from integration_tests.gpu.cases import stream


@pytest.mark.parametrize("block_bytes", [16, 48, 32768, 32784, 368_640, 2 << 20])
@pytest.mark.parametrize("num_pairs", [1, 3, 40])
def test_targets_become_their_sources(device: Device, block_bytes: int, num_pairs: int) -> None:
    generator = torch.Generator().manual_seed(num_pairs)
    pool = torch.randint(256, (100, block_bytes), generator=generator, dtype=torch.uint8).cuda()
    ids = torch.randperm(100, generator=generator).to("cuda", torch.int32)
    sources, targets = ids[:num_pairs].clone(), ids[50 : 50 + num_pairs].clone()
    expected = pool.clone()
    expected[targets.long()] = expected[sources.long()]
    CopyBlocks(device).pack(pool=pool, sources=sources, targets=targets).run(stream())
    torch.cuda.synchronize()
    assert torch.equal(pool, expected)


def test_a_source_may_have_many_targets(device: Device) -> None:
    pool = torch.arange(8, dtype=torch.uint8).repeat_interleave(64).view(8, 64).cuda()
    sources, targets = (torch.tensor(ids, dtype=torch.int32).cuda() for ids in ([2] * 3, [5, 6, 7]))
    CopyBlocks(device).pack(pool=pool, sources=sources, targets=targets).run(stream())
    assert pool[:, 0].tolist() == [0, 1, 2, 3, 4, 2, 2, 2]


def test_blocks_of_odd_size_are_our_mistake(device: Device) -> None:
    pool = torch.zeros(4, 40, dtype=torch.uint8, device="cuda")
    ids = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(AssertionError, match="40"):
        CopyBlocks(device).pack(pool=pool, sources=ids, targets=ids)

"""Staged tokens and block table entries against numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cupy_kernels.device import Device
from cupy_kernels.staging import StageTokens, TokenColumns, WriteTable
from integration_tests.gpu.cases import stream

GUARD = 7


@pytest.mark.parametrize("num_tokens", [1, 3, 255, 256, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_tokens_get_ids_and_slots(device: Device, num_tokens: int, block_size: int) -> None:
    rng = np.random.default_rng(num_tokens)
    table = rng.integers(0, 1 << 20, (9, 33)).astype(np.int32)
    last = rng.integers(0, 50_000, 9).astype(np.int32)
    tokens = np.empty((num_tokens, 4), np.int32)
    tokens[:, 0] = np.where(rng.random(num_tokens) < 0.5, -1, rng.integers(0, 9, num_tokens))
    tokens[:, 1] = rng.integers(0, 9, num_tokens)
    tokens[:, 2] = rng.integers(0, 33 * block_size, num_tokens)
    tokens[:, 3] = rng.random(num_tokens) < 0.8
    names = [field.name for field in dataclasses.fields(TokenColumns)]
    columns = {
        name: torch.full((num_tokens + 3,), GUARD, dtype=torch.int32, device="cuda")
        for name in names
    }
    StageTokens(device, block_size).pack(
        tokens=torch.from_numpy(tokens).cuda(),
        last_tokens=torch.from_numpy(last).cuda(),
        block_table=torch.from_numpy(table).cuda(),
        columns=TokenColumns(**columns),
    ).run(stream())
    ids, rows, positions, is_real = tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3] > 0
    slots = table[rows, positions // block_size] * block_size + positions % block_size
    expected = {
        "token_ids": np.where(is_real, np.where(ids < 0, last[rows], ids), 0),
        "rows": np.where(is_real, rows, 0),
        "positions": np.where(is_real, positions, 0),
        "slot_mapping": np.where(is_real, slots, -1),
        "seq_lens": np.where(is_real, positions + 1, 0),
    }
    for name in names:
        found = columns[name].cpu().numpy()
        np.testing.assert_array_equal(found[:num_tokens], expected[name], err_msg=name)
        assert (found[num_tokens:] == GUARD).all(), name


@pytest.mark.parametrize("num_entries", [1, 256, 3000])
def test_entries_are_written(device: Device, num_entries: int) -> None:
    rng = np.random.default_rng(num_entries)
    table = rng.integers(0, 1000, (64, 64)).astype(np.int32)
    entries = np.empty((num_entries, 2), np.int32)
    entries[:, 0] = rng.permutation(table.size)[:num_entries]
    entries[:, 1] = rng.integers(0, 1000, num_entries)
    entries = np.concatenate([entries, entries[:1]])  # one stands twice
    on_device = torch.from_numpy(table).cuda()
    launch = WriteTable(device).pack(
        entries=torch.from_numpy(entries).cuda(), block_table=on_device
    )
    launch.run(stream())
    table.reshape(-1)[entries[:, 0]] = entries[:, 1]
    np.testing.assert_array_equal(on_device.cpu().numpy(), table)


def test_a_launch_may_be_resized(device: Device) -> None:
    """Fewer tokens than packed for: the others' places stay as they are."""
    staging = StageTokens(device, 16)
    table = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    columns = [torch.full((600,), GUARD, dtype=torch.int32, device="cuda") for _ in range(5)]
    tokens = torch.tensor([[5, 0, 3, 1]] * 600, dtype=torch.int32, device="cuda")
    last = torch.zeros(1, dtype=torch.int32, device="cuda")
    launch = staging.pack(
        tokens=tokens, last_tokens=last, block_table=table, columns=TokenColumns(*columns)
    )
    staging.resize(launch, 300).run(stream())
    assert columns[0][:300].eq(5).all()
    assert columns[0][300:].eq(GUARD).all()

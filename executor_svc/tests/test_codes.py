"""Files of quantised blocks: what is wrong with one is said, and loading goes on without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executor_svc.model.codes import BlockFormat, Codes, CodesFile, stack
from executor_svc.model.errors import WeightsError

SHAPE = (3, 64)
BLOCKS = torch.arange(3 * 2 * 20, dtype=torch.uint8).view(3, 40)


def write(path: Path, blocks: torch.Tensor = BLOCKS, name: str = "Q4_1") -> Path:
    save_file({"w": blocks}, path / "model.codes", metadata={"w": name})
    return path / "model.codes"


def test_blocks_come_back(tmp_path: Path) -> None:
    with CodesFile(write(tmp_path)) as file:
        codes = file.take("w", SHAPE)
        assert codes is not None
        assert (codes.name, codes.format) == ("w", BlockFormat.Q4_1)
        assert torch.equal(codes.blocks, BLOCKS)
        assert file.take("another", SHAPE) is None


@pytest.mark.parametrize(
    ("blocks", "name", "shape", "message"),
    [
        (BLOCKS, "Q2_K", SHAPE, "unknown format 'Q2_K'"),
        (BLOCKS, "Q8_0", SHAPE, "not those of a Q8_0 weight"),
        (BLOCKS, "Q4_1", (4, 64), "not those of a Q4_1 weight of shape [4, 64]"),
        (BLOCKS, "Q4_1", (3, 70), "not those of a Q4_1 weight of shape [3, 70]"),
        (BLOCKS.view(torch.int8), "Q4_1", SHAPE, "has I8 blocks"),
    ],
)
def test_what_cannot_be_the_weights_is_named(
    blocks: torch.Tensor, name: str, shape: tuple[int, int], message: str, tmp_path: Path
) -> None:
    with CodesFile(write(tmp_path, blocks, name)) as file, pytest.raises(WeightsError) as caught:
        file.take("w", shape)
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 60, 150])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.codes: not a readable codes file"):
        CodesFile(path)


def test_parts_are_stacked_if_all_have_codes_of_one_format() -> None:
    q4, q8 = (Codes(name, BlockFormat(name), BLOCKS) for name in ("Q4_1", "Q8_0"))
    stacked = stack([q4, q4])
    assert stacked is not None
    assert torch.equal(stacked.blocks, torch.cat([BLOCKS, BLOCKS]))
    assert stack([q4, None]) is None
    assert stack([q4, q8]) is None
    assert stack([None]) is None

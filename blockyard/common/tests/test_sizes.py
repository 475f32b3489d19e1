"""Sizes as people write them."""

from __future__ import annotations

import pytest

from blockyard.common.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10B", 10),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2TiB", 2 << 40),
        ("2GB", 2_000_000_000),
        (" 3 mb ", 3_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "-1GiB", "1GiBs", "1.GiB", "GiB", "1 2", "1e9", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)

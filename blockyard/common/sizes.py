"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Final

_FACTORS: Final = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 1 << (10 * power) for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes in "1GiB", "1.5 GB", "4096", ...: binary units end in iB, decimal ones in B.

    Raises ValueError if it is not a size.
    """
    match = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in _FACTORS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB or 1.5GiB")
    return int(float(match[1]) * units[match[2].lower()])

"""Little-endian uint32 columns: the `bytes` fields of the wire contracts that hold ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U32 = np.dtype("<u4")


def pack_u32(values: npt.NDArray[np.integer] | Sequence[int]) -> bytes:
    """Encode non-negative ids [n] as 4 * n bytes."""
    return np.ascontiguousarray(values, dtype=U32).tobytes()


def unpack_u32(data: bytes) -> npt.NDArray[np.uint32]:
    """Decode to a read-only array [n]. Raises ValueError if the length is not a multiple of 4."""
    return np.frombuffer(data, dtype=U32)

"""What the host tells the device of a step: one pinned buffer, one copy.

    [sampling columns, max_rows each][staged tokens, 4 ints each][whatever else the step needs]

Columns and tokens always begin at the same place, where captured graphs read them; the rest comes
after the step's last token, so that a copy is no longer than what the step says.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cupy_kernels.staging import TOKEN_INTS

_ALIGNMENT: Final = 4  # ints in 16 bytes
_DTYPES: Final = {
    "temperature": (np.float32, torch.float32),
    "top_k": (np.int32, torch.int32),
    "top_p": (np.float32, torch.float32),
    "min_p": (np.float32, torch.float32),
    "branches": (np.int32, torch.int32),
    "positions": (np.int32, torch.int32),
    "rows": (np.int32, torch.int32),
    "logits_indices": (np.int32, torch.int32),
}
_SEED_INTS: Final = 2
EXTRA_INTS: Final = 1 << 20
"""Room for the rest of a step's numbers."""

Ints = npt.NDArray[np.int32]


class StepArena:
    """Device memory of one step's numbers; the steps' host buffers take turns."""

    def __init__(self, max_rows: int, max_tokens: int, device: torch.device) -> None:
        """Allocate the device's side."""
        self._max_rows = _aligned(max_rows)
        self._num_columns = (_SEED_INTS + len(_DTYPES)) * self._max_rows
        self.capacity = self._num_columns + TOKEN_INTS * _aligned(max_tokens) + EXTRA_INTS
        self._device = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        self._host: Tensor = torch.empty(0)
        self._ints: Ints = np.empty(0, np.int32)
        self._end = 0
        tokens_end = self._num_columns + TOKEN_INTS * max_tokens
        # [max_tokens, 4]
        self.tokens = self._device[self._num_columns : tokens_end].view(-1, TOKEN_INTS)
        self.columns = self._device_columns()

    def _device_columns(self) -> dict[str, Tensor]:
        size = self._max_rows
        columns = {"seeds": self._device[: _SEED_INTS * size].view(torch.int64)}
        for place, (name, (_, dtype)) in enumerate(_DTYPES.items(), _SEED_INTS):
            columns[name] = self._device[place * size : (place + 1) * size].view(dtype)
        return columns

    def begin(self, host: Tensor, num_tokens: int) -> npt.NDArray[np.int32]:
        """Start a step in a pinned buffer [capacity]; returns its tokens, [num_tokens, 4]."""
        self._host = host
        self._ints = host.numpy()
        self._end = self._num_columns + TOKEN_INTS * num_tokens
        return self._ints[self._num_columns : self._end].reshape(-1, TOKEN_INTS)

    def fill(self, name: str, values: npt.NDArray[Any]) -> None:
        """Set the first values of a sampling column."""
        size = self._max_rows
        if name == "seeds":
            self._ints[: _SEED_INTS * size].view(np.uint64)[: values.size] = values
            return
        place = _SEED_INTS + list(_DTYPES).index(name)
        column = self._ints[place * size : (place + 1) * size].view(_DTYPES[name][0])
        column[: values.size] = values

    @property
    def room(self) -> int:
        """Ints that `put` still takes."""
        return self.capacity - self._end - _ALIGNMENT

    def put(self, values: npt.NDArray[Any]) -> Tensor:
        """Add an array of any shape; returns where it will be on the device, int32."""
        begin = _aligned(self._end)
        end = begin + values.size
        assert end <= self.capacity, (end, self.capacity)
        self._ints[begin:end] = values.reshape(-1)
        self._end = end
        return self._device[begin:end].view(values.shape)

    def upload(self) -> None:
        """Enqueue the copy on the current stream; no more may be added."""
        self._device[: self._end].copy_(self._host[: self._end], non_blocking=True)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT

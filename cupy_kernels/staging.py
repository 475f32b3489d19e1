"""Bringing a step's few new numbers to where its kernels read them: tokens, block table entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address

TOKEN_INTS: Final = 4
"""Of a staged token: id (below 0: sampled last), row, position, 1 (0: padding)."""
ENTRY_INTS: Final = 2
"""Of a block table entry: row * max_blocks_per_row + place, block id."""

_THREADS: Final = 256


def staging_variants() -> dict[str, Variant]:
    """The kernels by name; one set for all models."""
    return {name: Variant(name) for name in ("stage_tokens", "write_table")}


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """A step's tokens, columns [max_tokens] int32 on the device; padding stands at the end.

    Attributes:
        token_ids: 0 for padding.
        rows: places in the block table; 0 for padding.
        positions: 0 for padding.
        slot_mapping: block_id * block_size + offset; -1 for padding.
        seq_lens: position + 1; 0 for padding.
    """

    token_ids: DeviceTensor
    rows: DeviceTensor
    positions: DeviceTensor
    slot_mapping: DeviceTensor
    seq_lens: DeviceTensor


class StageTokens:
    """Launches of sources/stage_tokens.cu."""

    def __init__(self, device: Device, block_size: int) -> None:
        """Load the kernel."""
        self._block_size = block_size
        self._kernel = device.load(staging_variants()["stage_tokens"])

    def pack(
        self,
        *,
        tokens: DeviceTensor,
        last_tokens: DeviceTensor,
        block_table: DeviceTensor,
        columns: TokenColumns,
    ) -> Launch:
        """Fill the columns of a step.

        Args:
            tokens: [num_tokens, 4] int32, see TOKEN_INTS.
            last_tokens: [max_rows] int32, the token that each row sampled last.
            block_table: [max_rows, max_blocks_per_row] int32.
            columns: the first num_tokens of each are written.
        """
        num_tokens = tokens.shape[0]
        names = ("token_ids", "rows", "positions", "slot_mapping", "seq_lens")
        params = {
            "tokens": address(tokens, "int32", num_tokens, TOKEN_INTS),
            "last_tokens": address(last_tokens, "int32", None),
            "block_table": address(block_table, "int32", None, None),
            **{name: address(getattr(columns, name), "int32", None) for name in names},
            "num_tokens": num_tokens,
            "table_stride": block_table.shape[1],
            "block_size": self._block_size,
        }
        return Launch(self._kernel, -(-num_tokens // _THREADS), _THREADS, params)

    def resize(self, launch: Launch, num_tokens: int) -> Launch:
        """The launch for another number of tokens, at most those that it was packed for."""
        return launch.resize(-(-num_tokens // _THREADS), num_tokens=num_tokens)


class WriteTable:
    """Launches of sources/write_table.cu."""

    def __init__(self, device: Device) -> None:
        """Load the kernel."""
        self._kernel = device.load(staging_variants()["write_table"])

    def pack(self, *, entries: DeviceTensor, block_table: DeviceTensor) -> Launch:
        """Change entries of the block table.

        Args:
            entries: [n, 2] int32, see ENTRY_INTS; n > 0. A place may stand twice with one id.
            block_table: [max_rows, max_blocks_per_row] int32.
        """
        num_entries = entries.shape[0]
        params = {
            "entries": address(entries, "int32", num_entries, ENTRY_INTS),
            "block_table": address(block_table, "int32", None, None),
            "num_entries": num_entries,
        }
        return Launch(self._kernel, -(-num_entries // _THREADS), _THREADS, params)

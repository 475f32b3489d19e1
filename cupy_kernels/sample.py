"""Sampling on the device: one token from each row of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import ElementType
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address

_THREADS: Final = 512
_VECTOR: Final = 8  # logits in 16 bytes
_MAX_CLUSTER_SIZE: Final = 8  # blocks of threads per row


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Parameters of the rows that sample, columns [num_rows] on the device.

    Attributes:
        temperature: float32; 0 takes the highest logit, the lowest id among equals.
        top_k: int32; 0: off.
        top_p: float32; 0 and 1: off.
        min_p: float32; 0: off.
        seeds: int64, the bits of an unsigned one.
        branches: int32.
        positions: int32, absolute position of the token to be sampled.
    """

    temperature: DeviceTensor
    top_k: DeviceTensor
    top_p: DeviceTensor
    min_p: DeviceTensor
    seeds: DeviceTensor
    branches: DeviceTensor
    positions: DeviceTensor


def sample_variant(element: ElementType) -> Variant:
    """The kernel for logits of a type."""
    return Variant("sample", {"ELEMENT_BF16": int(element == "bfloat16")})


class Sample:
    """Launches of sources/sample.cu."""

    def __init__(self, device: Device, element: ElementType) -> None:
        """Load the kernel."""
        self._element = element
        self._num_sms = device.num_sms if device.is_hopper else 0  # that can run clusters
        self._kernel = device.load(sample_variant(element))

    def pack(
        self,
        *,
        logits: DeviceTensor,
        vocab_size: int,
        columns: SamplingColumns,
        token_ids: DeviceTensor,
        status: DeviceTensor,
        rows: DeviceTensor | None = None,
        last_tokens: DeviceTensor | None = None,
    ) -> Launch:
        """Temperature, top-k, top-p of what is left, min-p; then a Gumbel-max draw.

        Args:
            logits: [num_rows, stride] of the element type, after penalties; stride is a multiple of
                8, and what lies behind vocab_size is ignored.
            vocab_size: logits of a row.
            columns: per row.
            token_ids: [num_rows] int32, written; 0 for failed rows.
            status: [num_rows] int32, written: 1 if there is a NaN or Inf among the logits, else 0.
            rows: [num_rows] int32, with last_tokens; all different.
            last_tokens: [max_rows] int32, if given; entry rows[i] is written as token_ids[i].
        """
        num_rows, stride = logits.shape
        assert stride % _VECTOR == 0, stride
        assert 0 < vocab_size <= stride, vocab_size
        params = {
            "logits": address(logits, self._element, num_rows, stride),
            "temperature": address(columns.temperature, "float32", num_rows),
            "top_k": address(columns.top_k, "int32", num_rows),
            "top_p": address(columns.top_p, "float32", num_rows),
            "min_p": address(columns.min_p, "float32", num_rows),
            "seeds": address(columns.seeds, "int64", num_rows),
            "branches": address(columns.branches, "int32", num_rows),
            "positions": address(columns.positions, "int32", num_rows),
            "token_ids": address(token_ids, "int32", num_rows),
            "status": address(status, "int32", num_rows),
            "rows": 0 if rows is None else address(rows, "int32", num_rows),
            "last_tokens": 0 if last_tokens is None else address(last_tokens, "int32", None),
            "vocab_size": vocab_size,
            "stride": stride,
        }
        return self._shape(Launch(self._kernel, num_rows, _THREADS, params), num_rows)

    def resize(
        self, launch: Launch, num_rows: int, token_ids: DeviceTensor, status: DeviceTensor
    ) -> Launch:
        """The launch for fewer rows or more, and other results, at most as many as packed for."""
        results = {
            "token_ids": address(token_ids, "int32", None),
            "status": address(status, "int32", None),
        }
        return self._shape(launch, num_rows, **results)

    def _shape(self, launch: Launch, num_rows: int, **params: int) -> Launch:
        size = cluster_size(num_rows, self._num_sms)
        return launch.resize(num_rows * size, cluster_size=size, **params)


def cluster_size(num_rows: int, num_sms: int) -> int:
    """Blocks of threads for each row, on so many SMs that can run clusters.

    Eight or four as long as each gets an SM for itself; two also where they must share one, which
    larger clusters do badly; one if there are more rows than SMs.
    """
    size = _MAX_CLUSTER_SIZE
    while size > 2 and num_rows * size > num_sms:
        size //= 2
    return size if num_rows <= num_sms else 1

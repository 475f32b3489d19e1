"""What a device must do for a decoder's forward pass.

A model is written once against this protocol; a backend owns the layout of a KV block, the kernels
and their scratch memory. Tokens of all rows are flattened: T is the number of tokens in the step.
How a step begins is between a backend and its runner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from executor_svc.model.codes import Codes

Linear = Callable[[Tensor], Tensor]
"""[T, in_features] -> [T, out_features]."""


class Backend(Protocol):
    """One device. Results of one call may be overwritten by the next of a method or projection."""

    def place(self, weight: Tensor) -> Tensor:
        """Bring a weight of any float type to the device, in its element type."""

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, codes: Codes | None = None
    ) -> Linear:
        """Bring placed weight [out_features, in_features] and bias into the device's own form.

        A device may also compute with the weight's codes, if there are any.
        """

    def pack_head(self, weight: Tensor, codes: Codes | None = None) -> Linear:
        """The same for the projection to the vocabulary, of as many tokens as rows sample."""

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, hidden] normalised by root mean square, times weight [hidden]."""

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Add delta to residual in place, both [T, hidden]; then rms_norm of the sum."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 * intermediate], gate first."""

    def write_kv(
        self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        """Rotate queries and keys of qkv [T, (heads + 2 * kv_heads) * head_dim] in place.

        Then store keys and values of every token in its slot of `layer`. If given, q_norm and
        k_norm [head_dim] first normalise each head (RMS).
        """

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Causal attention of the step's queries over their rows' slots of `layer`.

        Returns [T, heads * head_dim]. All keys and values of the step must have been written.
        """

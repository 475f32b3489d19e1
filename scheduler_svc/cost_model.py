"""What a step costs, as the executor fitted it from its own timings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from blockyard.executor.v1 import executor_pb2


@dataclass(frozen=True, slots=True)
class CostModel:
    """See CostModel in executor.proto. A price of zero is unknown."""

    step_ns: float = 0.0
    token_ns: float = 0.0
    kv_bytes_per_s: float = 0.0
    swap_bytes_per_s: float = 0.0
    free_tokens: int = 0
    pair_ns: float = 0.0

    @classmethod
    def of(cls, message: executor_pb2.CostModel) -> Self:
        """The same prices as the executor sent."""
        return cls(
            step_ns=message.step_ns,
            token_ns=message.token_ns,
            kv_bytes_per_s=message.kv_bytes_per_s,
            swap_bytes_per_s=message.swap_bytes_per_s,
            free_tokens=message.free_tokens,
            pair_ns=message.pair_ns,
        )

    @property
    def has_step_prices(self) -> bool:
        """Whether anything is known of a step without swaps."""
        return bool(self.step_ns or self.token_ns or self.kv_bytes_per_s)

    def step_time_ns(
        self, num_tokens: int, context_bytes: float, swapped_bytes: float, num_pairs: float = 0
    ) -> float:
        """Predicted device time of one step.

        Args:
            num_tokens: scheduled in the step.
            context_bytes: KV that its rows read, each row's whole context once.
            swapped_bytes: moved between device and host, both ways.
            num_pairs: see causal_pairs; of rows with several new tokens.
        """
        total_ns = self.step_ns + self.token_ns * max(0, num_tokens - self.free_tokens)
        total_ns += self.pair_ns * num_pairs
        if self.kv_bytes_per_s:
            total_ns += context_bytes / self.kv_bytes_per_s * 1e9
        if self.swap_bytes_per_s:
            total_ns += swapped_bytes / self.swap_bytes_per_s * 1e9
        return total_ns

    def prefill_time_ns(self, num_tokens: int) -> float:
        """Predicted device time of a prompt alone."""
        return self.step_time_ns(num_tokens, 0, 0, causal_pairs(num_tokens, 0))


def causal_pairs(num_tokens: int, num_tokens_before: int) -> int:
    """Pairs of a new token and one it attends to: itself, the new ones before it, all the old."""
    return num_tokens * num_tokens_before + num_tokens * (num_tokens + 1) // 2

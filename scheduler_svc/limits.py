"""What one executor holds and what the operator allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that the scheduler must stay within; constant for an epoch."""

    num_device_blocks: int  # the padding block included
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    watermark_blocks: int = 0
    num_host_blocks: int = 0
    block_bytes: int = 0  # for the price of moving one

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) must be 1 to max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running branch decodes one token a step"
            )

    @property
    def num_usable_blocks(self) -> int:
        """Device blocks that can be allocated: all but the padding block."""
        return self.num_device_blocks - 1

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one branch: the last token needs no KV slot."""
        return min(self.max_model_len, self.num_usable_blocks * self.block_size + 1)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` token states."""
        return -(-num_tokens // self.block_size)

    def max_beam_tokens(self, num_prompt_tokens: int, width: int) -> int:
        """Longest prompt + output of a beam search: its lanes share the prompt's full blocks only.

        At most num_prompt_tokens if not even the prompt fits.
        """
        num_shared = min(num_prompt_tokens // self.block_size, self.num_usable_blocks)
        num_blocks = num_shared + (self.num_usable_blocks - num_shared) // width
        return min(self.max_model_len, num_blocks * self.block_size + 1)

    def beam_blocks(self, num_prompt_tokens: int, max_total_tokens: int, width: int) -> int:
        """Most blocks that a beam search of this length can hold."""
        num_shared = num_prompt_tokens // self.block_size
        return num_shared + width * (self.blocks_for(max_total_tokens - 1) - num_shared)

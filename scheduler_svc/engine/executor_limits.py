"""What an executor holds, as far as the settings let it."""

from __future__ import annotations

from blockyard.executor.v1 import executor_pb2
from scheduler_svc.config import EngineSettings
from scheduler_svc.limits import Limits


def limits_of(info: executor_pb2.DescribeResponse, settings: EngineSettings) -> Limits:
    """The limits of an executor that describes itself so."""
    budget = min(
        settings.max_num_batched_tokens or info.max_num_batched_tokens,
        info.max_num_batched_tokens,
    )
    return Limits(
        num_device_blocks=info.num_device_blocks,
        block_size=info.block_size,
        max_num_seqs=min(settings.max_num_seqs or info.max_rows, info.max_rows, budget),
        max_num_batched_tokens=budget,
        max_model_len=min(settings.max_model_len or info.max_model_len, info.max_model_len),
        vocab_size=info.vocab_size,
        watermark_blocks=int(settings.watermark * info.num_device_blocks),
        num_host_blocks=info.num_host_blocks,
        block_bytes=info.block_bytes,
    )

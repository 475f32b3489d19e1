"""What the host sets up around the device: locked memory, and a pool of what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blockyard.executor.v1 import executor_pb2 as pb
from cupy_kernels.device import import_cupy
from executor_svc.backends.cuda.host_memory import HostBlocks
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.plan_check import MAX_CANDIDATES
from executor_svc.tests.models import tiny_config, write_model
from executor_svc.tests.plan_driver import PlanDriver
from executor_svc.tests.plans import batch, new_rows

MIB = 1 << 20
UTILIZATION = 0.5
MAX_ROWS = 64


def is_locked(blocks: torch.Tensor) -> bool:
    """Whether the driver knows the memory as page-locked already."""
    runtime: Any = import_cupy().cuda.runtime
    try:
        runtime.hostRegister(blocks.data_ptr(), blocks.numel(), 0)
    except runtime.CUDARuntimeError as error:
        if "AlreadyRegistered" not in str(error):
            raise
        return True
    runtime.hostUnregister(blocks.data_ptr())
    return False


def test_host_blocks_are_locked_while_somebody_holds_them() -> None:
    host = HostBlocks(33, 1 * MIB + 4096)
    blocks = host.blocks
    assert is_locked(blocks)
    assert not blocks.any()
    blocks.random_(0, 256)
    assert torch.equal(blocks.cuda().cpu(), blocks)
    del host
    assert not is_locked(blocks)
    assert blocks.any()  # and still mapped


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config(
        vocab_size=2048, hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2
    )
    write_model(tmp_path, config, matrix_spread=0.1)
    return tmp_path


def test_the_pool_is_what_is_left_and_steps_take_no_more(model: Path) -> None:
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    options = CudaOptions(
        block_size=16,
        max_rows=MAX_ROWS,
        max_num_batched_tokens=4096,
        max_model_len=None,
        host_memory_bytes=64 * MIB,
        memory_utilization=UTILIZATION,
    )
    runner = load_runner(model, options, lambda _stage, _done: None)
    pool_bytes = runner.info.num_device_blocks * runner.info.block_bytes
    to_have = free_before - (1 - UTILIZATION) * total
    assert 0.9 * to_have < pool_bytes < to_have
    free, _ = torch.cuda.mem_get_info()
    assert free > (1 - UTILIZATION) * total - 64 * MIB

    driver = PlanDriver(runner)
    tokens = list(range(64))
    rows = [
        {"row": row, "tokens": tokens, "blocks": driver.take(64), "num_candidates": MAX_CANDIDATES}
        for row in range(MAX_ROWS)
    ]
    outputs = driver.run(
        new_rows=new_rows(*rows), batch=batch(*((row, len(tokens)) for row in range(MAX_ROWS)))
    )
    assert outputs.candidate_token_ids.size == MAX_ROWS * MAX_CANDIDATES
    driver.lengths = dict.fromkeys(range(MAX_ROWS), len(tokens))
    for count in (MAX_ROWS, 37, 1):
        driver.decode(*range(count))
    ids = list(range(200))
    driver.run(swap_out=pb.BlockPairs(src=[i + 1 for i in ids], dst=ids))
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] < 16 * MIB

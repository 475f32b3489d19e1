"""The CPU's ModelRunner on a model directory, with a pool of NaN, driven by plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blockyard.common import model_dir
from executor_svc.model.config import parse_config
from executor_svc.model_runner import ModelRunner
from executor_svc.tests.plan_driver import PlanDriver


def block_bytes_of(path: Path, block_size: int) -> int:
    """Bytes of one float32 block of a model directory."""
    config = parse_config(model_dir.load(path).config)
    return 4 * block_size * config.kv_elements_per_token


class RunnerStack(PlanDriver):
    """One epoch of a runner of its own."""

    def __init__(self, path: Path, *, num_blocks: int = 64, seed: int = 0, **changes: Any) -> None:
        sizes: dict[str, Any] = {
            "block_size": 16,
            "max_rows": 8,
            "max_num_batched_tokens": 256,
            "max_model_len": None,
            "num_threads": 2,
            **changes,
        }
        block_bytes = block_bytes_of(path, sizes["block_size"])
        runner = ModelRunner.load(path, kv_memory_bytes=num_blocks * block_bytes, **sizes)
        super().__init__(runner, seed)
        self.pool = runner.pool
        self.pool.device[:] = np.nan

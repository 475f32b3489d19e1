"""A broken CUDA context: in a process of its own, since nothing works in it afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from executor_svc.tests.models import tiny_config, write_model

BREAK_AND_GO_ON = """
import sys
from pathlib import Path
from cupy_kernels.staging import StageTokens
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.runner import FatalDeviceError
from executor_svc.tests.plan_driver import PlanDriver

options = CudaOptions(16, 8, 64, None, kv_memory_bytes=1 << 22)
runner = load_runner(Path(sys.argv[1]), options, lambda _stage, _done: None)
driver = PlanDriver(runner)
driver.begin(0, list(range(20)))
resize = StageTokens.resize
StageTokens.resize = lambda *args: resize(*args).resize(1, tokens=16)  # an address of nobody's
driver.lengths[0] = 20
for attempt in range(2):
    try:
        driver.begin(1 + attempt, list(range(20)))
    except FatalDeviceError as error:
        print("lost:", error)
"""


def test_an_illegal_address_loses_the_device(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    write_model(tmp_path, config)
    command = [sys.executable, "-c", BREAK_AND_GO_ON, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("lost:")]
    assert len(lines) == 2, done.stdout + done.stderr
    assert "illegal memory access" in lines[0]

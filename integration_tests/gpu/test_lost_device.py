"""A broken CUDA context: in a process of its own, since nothing works in it afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from executor_svc.__main__ import DEVICE_LOST
from executor_svc.tests.models import tiny_config, write_model

# The executor's own program, whose service is a driver that has a kernel read an illegal address.
EXECUTOR = """
import sys
from cupy_kernels.staging import StageTokens
from executor_svc import __main__ as executor
from executor_svc.runner import FatalDeviceError
from executor_svc.tests.plan_driver import PlanDriver

async def lose_the_device(runner, *_settings):
    driver = PlanDriver(runner)
    driver.begin(0, list(range(20)))
    resize = StageTokens.resize
    StageTokens.resize = lambda *args: resize(*args).resize(1, tokens=16)  # an address of nobody's
    try:
        driver.begin(1, list(range(20)))
    except FatalDeviceError as error:
        print("first:", error, flush=True)
    driver.begin(2, list(range(20)))
    print("went on", flush=True)

executor.serve = lose_the_device
executor.leave(executor.main(sys.argv[1:]))
"""


def test_an_illegal_address_ends_the_executor_with_one_line(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    model = tmp_path / "model"
    write_model(model, config)
    flags = ["--device", "cuda", "--kv-memory", "4MiB", "--max-rows", "8"]
    flags += ["--max-num-batched-tokens", "64", "--model-dir", str(model)]
    command = [sys.executable, "-c", EXECUTOR, *flags, "--listen", f"unix:{tmp_path}/executor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert "first:" in done.stdout, said
    assert "illegal memory access" in done.stdout, said
    assert "went on" not in done.stdout  # every later call fails, too
    assert sum("device lost:" in line for line in said.splitlines()) == 1, said
    assert "Traceback" not in said
    assert done.returncode == DEVICE_LOST, said

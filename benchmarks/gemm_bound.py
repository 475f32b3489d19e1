"""The matrix products of one decode step and nothing else: `python -m benchmarks.gemm_bound DIR`.

A process of its own, as the backend's choice of threads must not reach any other measurement.
Prints a JSON list of rows, plain_ms and packed_ms; see cpu_step.measure_products.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.cpu_step import StepBench, Stopwatch, measure_products

# After the runner, which sets up threading.
import torch  # isort: skip

if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(measure_products(StepBench(Path(sys.argv[1]), 65), Stopwatch())))

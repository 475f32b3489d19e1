"""Timing launches on the device: medians over replays of a captured graph, and the ceilings."""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.source import Variant

# Its streams and events are untyped.
_cuda: Final[Any] = torch.cuda

_REPLAYS: Final = 15
# Clocks rise slowly: after 50 ms a device that was idle may still be at 85 % of its speed.
_WARM_UP_MS: Final = 250.0
_CEILING_BYTES: Final = 8 << 30
_READ_THREADS: Final = 512
_READ_BYTES_PER_BLOCK: Final = _READ_THREADS * 8 * 16


def graph_us(launches: Sequence[Launch | Callable[[], object]]) -> float:
    """Microseconds per launch of a graph that holds all of them in order; median of 15 replays."""

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            if isinstance(launch, Launch):
                launch.run(stream)
            else:
                launch()

    side = _cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run()
        warm_ms = 0.0
        while warm_ms < _WARM_UP_MS:
            warm_ms += _elapsed_ms(graph.replay)
        times = [_elapsed_ms(graph.replay) for _ in range(_REPLAYS)]
    return statistics.median(times) * 1e3 / len(launches)


def _elapsed_ms(work: Callable[[], object]) -> float:
    """Device time of what `work` enqueues on the current stream."""
    begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def host_us(launch: Launch) -> float:
    """Microseconds of host time per eager launch; median of 20 runs of 200."""
    stream = torch.cuda.current_stream().cuda_stream
    costs = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            launch.run(stream)
        costs.append((time.perf_counter() - begin) / 200 * 1e6)
    torch.cuda.synchronize()
    return statistics.median(costs)


def read_ceiling(device: Device) -> float:
    """Bytes per second of reading 8 GiB once with plain 16-byte loads."""
    source = torch.empty(_CEILING_BYTES, dtype=torch.uint8, device="cuda")
    source.random_()
    kernel = device.load(Variant("read_bandwidth", folder=pathlib.Path(__file__).parent))
    params = {
        "source": source.data_ptr(),
        "num_vectors": _CEILING_BYTES // 16,
        "sink": source.data_ptr(),
    }
    launch = Launch(kernel, _CEILING_BYTES // _READ_BYTES_PER_BLOCK, _READ_THREADS, params)
    return _CEILING_BYTES / graph_us([launch] * 3) * 1e6


def copy_ceiling() -> float:
    """Bytes per second, read plus written, of copying 4 GiB on the device; best of 8."""
    source = torch.empty(_CEILING_BYTES // 2, dtype=torch.uint8, device="cuda")
    source.random_()
    target = torch.empty_like(source)
    # Not in a graph: there a copy is left to the slower copy engine.
    best_ms = min(_elapsed_ms(lambda: target.copy_(source)) for _ in range(8))
    return 2 * source.numel() / best_ms * 1e3

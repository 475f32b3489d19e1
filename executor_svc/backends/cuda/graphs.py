"""CUDA graphs of pure decode steps, one for each of a few batch sizes; none depends on lengths."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes that are captured, ascending: padding stays under an eighth from 8 rows on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs:
    """Captured steps."""

    def __init__(self, max_rows: int) -> None:
        """Nothing is captured yet."""
        self._sizes = graph_sizes(max_rows)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(
        self,
        step: Callable[[int], object],
        stream: torch.cuda.Stream,
        progress: Callable[[float], None],
    ) -> None:
        """Run and capture step(size) on `stream`, largest size first; all share their memory.

        Graphs captured before are dropped; none of them may be under way.
        """
        self._graphs.clear()
        memory: Any = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            for done, size in enumerate(reversed(self._sizes), 1):
                step(size)  # what is set up on first use must not be captured
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(memory, capture_error_mode="thread_local")
                step(size)
                graph.capture_end()
                self._graphs[size] = graph
                progress(done / len(self._sizes))

    def size_for(self, num_rows: int) -> int:
        """Rows of the smallest graph that takes so many, which the largest does."""
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def replay(self, size: int) -> None:
        """Enqueue a step of exactly `size` rows on the current stream."""
        self._graphs[size].replay()

"""Swaps of the GPU's pool, on simulated streams: whatever the timing, blocks end as if in order."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.cuda import kv_pool
from executor_svc.backends.cuda.kv_pool import CudaKvPool, num_staging_blocks
from executor_svc.plan import Plan, decode
from executor_svc.tests.fake_streams import FakeEvent, FakeStream, run_all

BLOCK_BYTES = 16
NUM_DEVICE_BLOCKS, NUM_HOST_BLOCKS = 1000, 900
Blocks = np.ndarray[Any, np.dtype[np.uint8]]


class FakeLaunch:
    """The copy kernel."""

    def __init__(self, main: FakeStream, pool: torch.Tensor, ids: list[torch.Tensor]) -> None:
        self._main = main
        self._pool = pool
        self._sources, self._targets = (each.long() for each in ids)

    def run(self, stream: int) -> None:
        assert stream == self._main.cuda_stream
        self._main.queue.append(self._copy)

    def _copy(self) -> None:
        self._pool[self._targets] = self._pool[self._sources]


class FakeHost:
    def __init__(self) -> None:
        self.blocks = torch.zeros(NUM_HOST_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)


class Bench:
    """A pool, its two streams, and what the blocks should hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rng = random.Random(seed)
        self.main, self.side = FakeStream(1), FakeStream(2)
        self._current = self.main
        main = self.main

        class FakeCopyBlocks:
            def __init__(self, device: object) -> None:
                pass

            def pack(
                self, *, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
            ) -> FakeLaunch:
                return FakeLaunch(main, pool, [sources, targets])

        monkeypatch.setattr(kv_pool, "CopyBlocks", FakeCopyBlocks)
        monkeypatch.setattr(kv_pool, "new_stream", lambda device: self.side)
        monkeypatch.setattr(kv_pool, "new_event", FakeEvent)
        monkeypatch.setattr(kv_pool, "_enqueue_copy", self._enqueue_copy)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        main.device = torch.device("cpu")  # type: ignore[attr-defined]
        arguments: Any = (None, main, NUM_DEVICE_BLOCKS, FakeHost(), BLOCK_BYTES)
        self.pool = CudaKvPool(*arguments)
        self.pool.blocks.random_(generator=torch.Generator().manual_seed(seed))
        self.device: Blocks = self.pool.blocks[:NUM_DEVICE_BLOCKS].numpy().copy()
        self.host: Blocks = self.pool.host.numpy().copy()

    @contextlib.contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def _enqueue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._current.queue.append(partial(target.copy_, source))

    def launch(self, plan: Plan) -> None:
        """Enqueue a plan's moves, and do them at once where they should end."""
        for call in self.pool.stage(plan, torch.from_numpy):
            call()
        for source, target, pairs in (
            (self.device, self.host, plan.swap_out),
            (self.device, self.device, plan.copy),
            (self.host, self.device, plan.swap_in),
        ):
            target[pairs.dst] = source[pairs.src]

    def check(self) -> None:
        """Finish, and compare."""
        run_all([self.main, self.side], self.rng)
        assert np.array_equal(self.pool.blocks[:NUM_DEVICE_BLOCKS].numpy(), self.device)
        assert np.array_equal(self.pool.host.numpy(), self.host)


def random_plan(rng: random.Random, most: int) -> Plan:
    """Moves of up to `most` blocks each way, of which none reads from the host what it writes."""
    host = rng.sample(range(NUM_HOST_BLOCKS), 2 * most)
    targets = rng.sample(range(1, NUM_DEVICE_BLOCKS), 2 * most)
    num_out, num_copied, num_in = (rng.choice([0, 1, rng.randint(0, most)]) for _ in range(3))
    sources = rng.sample(sorted(set(range(1, NUM_DEVICE_BLOCKS)) - set(targets)), num_copied)
    out = rng.sample(range(1, NUM_DEVICE_BLOCKS), num_out)
    plan = pb.StepPlan(
        swap_out=pb.BlockPairs(src=out, dst=host[:num_out]),
        copy=pb.BlockPairs(src=sources, dst=targets[:num_copied]),
        swap_in=pb.BlockPairs(src=host[most : most + num_in], dst=targets[most:][:num_in]),
    )
    return decode(plan)


@pytest.mark.parametrize("seed", range(30))
def test_plans_move_blocks_as_if_one_after_another(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    bench = Bench(monkeypatch, seed)
    for _ in range(12):
        bench.launch(random_plan(bench.rng, bench.rng.choice([3, 40, 300])))
        if bench.rng.random() < 0.3:
            for stream in bench.rng.sample([bench.main, bench.side], 2):
                for _ in range(bench.rng.randrange(40)):
                    stream.step()
    bench.check()


@pytest.mark.parametrize("forgotten", ["is_free", "is_filled"])
def test_a_forgotten_event_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    wait_event = FakeStream.wait_event
    bench = Bench(monkeypatch, 0)
    pieces = [*bench.pool._out, *bench.pool._in]
    deaf = {id(getattr(piece, forgotten)) for piece in pieces}
    monkeypatch.setattr(
        FakeStream,
        "wait_event",
        lambda self, event: None if id(event) in deaf else wait_event(self, event),
    )
    for _ in range(12):
        bench.launch(random_plan(bench.rng, 300))
    with pytest.raises(AssertionError):
        bench.check()


def test_a_burst_that_staging_holds_keeps_no_step_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link has done nothing yet, and the step's own stream is through."""
    bench = Bench(monkeypatch, 1)
    ids = list(range(1, 1 + num_staging_blocks(BLOCK_BYTES)))
    bench.launch(decode(pb.StepPlan(swap_out=pb.BlockPairs(src=ids, dst=ids))))
    while bench.main.step():
        pass
    assert not bench.main.queue
    assert bench.side.queue
    one_more = pb.BlockPairs(src=[400], dst=[400])
    bench.launch(decode(pb.StepPlan(swap_out=one_more)))
    while bench.main.step():
        pass
    assert bench.main.queue  # until the first piece is free again
    bench.check()


def test_what_comes_in_is_fetched_before_the_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside blocks that go out in the same plan, too, which wait for the step before."""
    bench = Bench(monkeypatch, 2)
    out, into = pb.BlockPairs(src=[1, 2], dst=[5, 6]), pb.BlockPairs(src=[7, 8], dst=[1, 2])
    bench.launch(decode(pb.StepPlan(swap_out=out, swap_in=into)))
    while bench.side.step():
        pass
    begin = bench.pool._in[0].begin
    assert torch.equal(bench.pool.blocks[begin : begin + 2], bench.pool.host[7:9])
    bench.check()


@pytest.mark.parametrize("block_bytes", [16, 1 << 14, 1 << 21, 10 << 20, 1 << 30])
def test_staging_is_whole_pieces_of_bounded_size(block_bytes: int) -> None:
    count = num_staging_blocks(block_bytes)
    assert count % 8 == 0
    assert 8 <= count <= 128
    assert count == 8 or count * block_bytes <= 256 << 20

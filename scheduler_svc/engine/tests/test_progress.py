from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from scheduler_svc.engine.progress import ProgressWatch

PERIOD_S = 0.2


class _Executor:
    """What is watched, and what was told of it."""

    def __init__(self) -> None:
        self.is_idle = False
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        self.watch = ProgressWatch(PERIOD_S, lambda: self.is_idle, self._note)

    def _note(self) -> None:
        self.changes.put_nowait(self.watch.is_stalled)

    async def changed(self) -> bool:
        """The next change."""
        return await asyncio.wait_for(self.changes.get(), 10)


@pytest.fixture
async def executor() -> AsyncIterator[_Executor]:
    executor = _Executor()
    running = asyncio.create_task(executor.watch.run())
    yield executor
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_work_that_does_not_move_is_a_stall_within_two_periods(executor: _Executor) -> None:
    begin = time.monotonic()
    assert await executor.changed() is True
    assert time.monotonic() - begin + 0.01 >= PERIOD_S
    assert time.monotonic() - begin <= 2 * PERIOD_S + 0.2  # of a busy machine
    executor.watch.advanced()
    assert await executor.changed() is False
    assert await executor.changed() is True  # it stands still again


async def test_steps_or_idleness_are_no_stall(executor: _Executor) -> None:
    for _ in range(10):
        executor.watch.advanced()
        await asyncio.sleep(PERIOD_S / 4)
    executor.is_idle = True
    await asyncio.sleep(2 * PERIOD_S)
    assert executor.changes.empty()


async def test_an_executor_that_is_known_to_be_stuck_is_one_at_once(executor: _Executor) -> None:
    executor.watch.lost()
    executor.watch.lost()
    assert executor.changes.qsize() == 1
    assert await executor.changed() is True
    executor.is_idle = True  # another one came
    assert await executor.changed() is False

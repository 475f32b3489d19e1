from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable

import pytest

from blockyard.launcher import child as child_module
from blockyard.launcher.child import Child, ChildSpec, ServeError

Lines = list[tuple[str, str]]


@contextlib.asynccontextmanager
async def _running(
    code: str, lines: Lines, *, is_up: bool = True, grace_s: float = 5.0
) -> AsyncIterator[tuple[Child, asyncio.Task[None]]]:
    spec = ChildSpec("toy", (sys.executable, "-u", "-S", "-c", code), grace_s)
    child = Child(spec, lambda name, line: lines.append((name, line)), lambda: is_up)
    task = child.start()
    try:
        yield child, task
    finally:
        await child.stop()
        await asyncio.gather(task, return_exceptions=True)


async def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


SLEEP = "import time; print('up'); time.sleep(60)"


async def test_output_is_relayed_line_by_line() -> None:
    lines: Lines = []
    code = (
        "import sys, time; print('one\\ntwo'); print('er\\xffr', file=sys.stderr); "
        "sys.stdout.write('10%\\r20%\\n' + 'x' * 200000 + '\\n'); sys.stdout.write('no newline')"
        "; sys.stdout.flush(); time.sleep(60)"
    )
    async with _running(code, lines):
        await _until(lambda: len(lines) >= 6)
    assert {name for name, _ in lines} == {"toy"}
    texts = [line for _, line in lines]
    assert sorted(texts[:3]) == ["er\xffr", "one", "two"]
    assert texts[3:] == ["10%", "20%", "x" * 200000, "no newline"]


async def test_a_killed_child_is_started_again() -> None:
    lines: Lines = []
    async with _running(SLEEP, lines) as (child, task):
        await _until(lambda: len(lines) == 1)
        first = child.pid
        child.replace()
        await _until(lambda: len(lines) == 2)
        assert first is not None
        assert child.pid != first
        assert not task.done()
    assert task.exception() is None


async def test_the_configuration_exit_code_is_final() -> None:
    lines: Lines = []
    code = "print('setting kv_memory: too small'); raise SystemExit(2)"
    async with _running(code, lines) as (_, task):
        with pytest.raises(ServeError, match="setting kv_memory: too small") as caught:
            await asyncio.wait_for(task, 10)
    assert caught.value.exit_code == 2
    assert len(lines) == 1


async def test_a_crash_loop_at_startup_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_S", (0.0,))
    lines: Lines = []
    async with _running("print('no GPU'); raise SystemExit(7)", lines, is_up=False) as (_, task):
        with pytest.raises(ServeError, match=r"died 5 times while starting(.|\n)*no GPU") as caught:
            await asyncio.wait_for(task, 20)
    assert caught.value.exit_code == 1
    assert len(lines) == 5


async def test_once_up_it_is_restarted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_S", (0.0,))
    lines: Lines = []
    async with _running("print('up'); raise SystemExit(7)", lines) as (_, task):
        await _until(lambda: len(lines) > 7)
        assert not task.done()


async def test_stop_kills_what_does_not_end() -> None:
    lines: Lines = []
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    async with _running(code, lines, grace_s=0.2) as (child, task):
        await _until(lambda: len(lines) == 1)
        pid = child.pid
        start = time.monotonic()
        await child.stop()
        assert time.monotonic() - start < 3
        await asyncio.wait_for(task, 3)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_stop_during_the_restart_delay_returns_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_S", (60.0,))
    lines: Lines = []
    async with _running("print('up')", lines) as (child, task):
        await _until(lambda: len(lines) == 1 and child.pid is None)
        await child.stop()
        await asyncio.wait_for(task, 3)
    assert len(lines) == 1


async def test_a_process_left_behind_does_not_hold_the_restart() -> None:
    lines: Lines = []
    code = (
        "import os, time; print('up', flush=True); "
        "os.fork() or (time.sleep(4), os._exit(0)); os._exit(3)"
    )
    async with _running(code, lines):
        await _until(lambda: len(lines) == 2, timeout_s=3.5)


async def test_a_killed_child_stays_dead() -> None:
    lines: Lines = []
    async with _running(SLEEP, lines) as (child, task):
        await _until(lambda: len(lines) == 1)
        child.kill()
        await asyncio.wait_for(task, 3)
    assert len(lines) == 1


async def test_stop_while_starting_leaves_no_process() -> None:
    lines: Lines = []
    async with _running(SLEEP, lines) as (child, task):
        await asyncio.sleep(0)  # the task has begun to start the process
        await child.stop()
        assert task.done()
        assert child.pid is None

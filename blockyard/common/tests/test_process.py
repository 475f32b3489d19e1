from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from blockyard.common.process import PARENT_VARIABLE, process_usage

_GRANDCHILD = """
import os, time
from blockyard.common.process import PARENT_VARIABLE, exit_with_parent
exit_with_parent()
assert PARENT_VARIABLE not in os.environ  # its own children have another parent
print("ready", flush=True)
time.sleep(60)
"""
_CHILD = f"""
import os, subprocess, sys
process = subprocess.Popen(
    [sys.executable, "-c", {_GRANDCHILD!r}],
    env={{**os.environ, {PARENT_VARIABLE!r}: str(os.getpid())}},
    start_new_session=True,
)
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is known on Linux only")
def test_usage_follows_what_is_used() -> None:
    before = process_usage()
    data = bytearray(b"x") * (64 << 20)
    end_s = time.process_time() + 0.05
    while time.process_time() < end_s:
        pass
    after = process_usage()
    assert 0.05 <= after.cpu_s - before.cpu_s < 1
    assert after.resident_bytes - before.resident_bytes > len(data) // 2


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
def test_a_child_dies_with_its_killed_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while _is_running(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
def test_a_child_whose_parent_died_before_it_looked_dies_too() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    late = subprocess.run(
        [sys.executable, "-c", _GRANDCHILD],
        env={**os.environ, PARENT_VARIABLE: str(dead.pid)},
        stdout=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert (late.returncode, late.stdout) == (-signal.SIGKILL, b"")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

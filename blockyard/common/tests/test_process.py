from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

_GRANDCHILD = """
import time
from blockyard.common.process import exit_with_parent
exit_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
_CHILD = f"""
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {_GRANDCHILD!r}], start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""


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


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""Work in several processes: in order, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

IN_ORDER = """
import time
from cxr_tf.processes import ordered_processes
def square(number):
    time.sleep(0.01 * (number % 3))
    return number * number
if __name__ == "__main__":
    with ordered_processes(square, {workers}) as run:
        print(*run(range(20)))
"""


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(tmp_path, workers):
    script = tmp_path / "script.py"  # a spawned process finds its functions in files that it can import
    script.write_text(IN_ORDER.format(workers=workers))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert list(map(int, done.stdout.split())) == [number * number for number in range(20)], done.stderr


KILLED = """
import multiprocessing, os, signal, sys, time
from cxr_tf.processes import ordered_processes
if __name__ == "__main__":
    with ordered_processes(abs, 2) as run:
        next(run(range(100)))
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if {forked} and (other := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        if {forked}:
            print(other, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("forked", [False, True])
def test_none_outlives_a_killed_parent(tmp_path, forked):
    """Not even where a process that the parent forked holds its pipes open."""
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(forked=forked))
    said = tmp_path / "said"  # a file: a pipe would stay open as long as whatever is left behind
    with said.open("w") as file:
        code = subprocess.run(
            [sys.executable, script], stdout=file, stderr=subprocess.DEVNULL, timeout=60, check=False
        ).returncode
    assert code == -signal.SIGKILL, said.read_text()
    workers, *others = (list(map(int, line.split())) for line in said.read_text().splitlines())
    assert len(workers) == 2
    try:
        until = time.monotonic() + 20
        while left := [pid for pid in workers if _runs(pid)]:
            assert time.monotonic() < until, f"still there: {left}"
            time.sleep(0.1)
    finally:
        for (pid,) in others:
            os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False

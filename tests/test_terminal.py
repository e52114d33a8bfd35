"""Commands at a terminal: errors in words, Ctrl-C, streams that are closed or full."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cxr_tf.errors import CxrError
from cxr_tf.operating import wrong_keys
from cxr_tf.terminal import command


def raising(error):
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(CxrError("film.png: is cut off"), 1, "error: film.png: is cut off\n"), (KeyboardInterrupt(), 130, "stopped\n")],
)
def test_what_ends_a_command_is_said_without_a_traceback(error, code, told, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert command(raising(error)) == code
    assert capsys.readouterr().err == told


def test_a_fault_of_ours_is_no_fault_of_the_stream(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(FileNotFoundError):
        command(lambda: len(Path("/no/such/folder").read_bytes()))


SCRIPT = """
import sys
from cxr_tf.terminal import command
def run():
    print("film Θ \\udce4.png" * 20_000)
    return 0
sys.exit(command(run))
"""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_name_can_be_printed(encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=env, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"film ") and b"\\udce4.png" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_said():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written (No space left on device).\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(4)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)
    process.stderr.close()


OPERATING = {
    "classes": ["a", "b"],
    "task": "multiclass",
    "size": 64,
    "storage_size": 80,
    "temperature": 1.5,
    "thresholds": {"a": 0.5, "b": 0.5},
    "mask_threshold": 0.5,
}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("classes", ["ab", [1], None]),
        ("task", ["both", None, 1]),
        ("size", ["64", 0, -1, 10**9, True, 1.5]),
        ("storage_size", [None, 0]),
        ("temperature", [0, -1, float("nan"), float("inf"), "1"]),
        ("thresholds", [[0.5], {"a": None}, {"a": "x"}]),
        ("mask_threshold", [0, 1, None, "a", float("nan")]),
    ],
)
def test_what_makes_no_sense_of_itself_is_named(key, values):
    assert wrong_keys(OPERATING) == []
    for value in values:
        assert wrong_keys(OPERATING | {key: value}) == [key], value
    assert wrong_keys({name: value for name, value in OPERATING.items() if name != key}) == [key]


@pytest.mark.parametrize("value", [None, 3, [], "text"])
def test_what_is_no_object_lacks_everything(value):
    assert wrong_keys(value) == list(OPERATING)
